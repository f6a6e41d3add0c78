"""Maximal update parametrization: the best learning rate of a narrow model is the best of a wide one (Yang et al. 2022,
arXiv:2203.03466, table 8).

With r = d_model / base width, against the standard parametrization, for Adam:

                        initial std    learning rate
    embedding           1              1
    hidden, residual    1 / sqrt(r)    1 / r
    router              1 / r          1 / r              (its output doesn't widen: table 3's output weights)
    head                1              1                  and logits times 1 / r
    norms, biases       1              1

The multiplier of the logits is the final norm's gain, which starts at 1 / r and learns 1 / r as fast: the same function and the
same updates, with no number outside the weights, so that a folder is read by whatever reads the architecture, and a tied head
needs nothing else. SOAP's updates are of Adam's size and take its column. Muon's updates of hidden matrices have singular values
that grow as sqrt(width) at one rate (0.2 sqrt(max(out, in))), Adam's one that grows as width: 1 / sqrt(r) keeps them.
Weight decay is divided by the same factor, so that each step shrinks the weights alike at every width. d_head stays the same as
heads are added: then the table's 1 / d_head for attention is the usual 1 / sqrt(d_head) up to a constant.
"""

import re
from collections.abc import Collection

OUTPUT_NORM = re.compile(r"(model|mtp\.\d+)\.norm\.(weight|bias)")  # before the head, also for further tokens


def rate_factor(name: str, role: str, *, ratio: float, optimizer: str) -> float:
    """What a parameter's learning rate is multiplied by."""
    if OUTPUT_NORM.fullmatch(name) or role == "router":
        return 1 / ratio
    if role in ("hidden", "residual"):
        return ratio**-0.5 if optimizer == "muon" else 1 / ratio
    return 1.0


def std_factor(role: str, *, ratio: float) -> float:
    """What the standard deviation of a matrix's initial values is multiplied by."""
    return {"hidden": ratio**-0.5, "residual": ratio**-0.5, "router": 1 / ratio}.get(role, 1.0)


def constant_at(name: str, role: str, constant: float, *, ratio: float) -> float:
    """A norm's or bias' initial value: the final norm's gain is that over r, of which an `offset` lacks 1."""
    if not OUTPUT_NORM.fullmatch(name) or role == "bias":
        return constant
    return (1 + constant) / ratio - 1 if role == "offset" else constant / ratio


def check_width(base_width: int, d_model: int, parameters: Collection[str], *, scales_embeddings: bool) -> float:
    """r = d_model / base_width. Raises ValueError for an architecture whose logits can't be scaled by its final norm."""
    if base_width < 1:
        raise ValueError(f"mup_base_width={base_width} must be >= 1: the width at which the rates were chosen")
    if "model.norm.weight" not in parameters:
        raise ValueError(
            "mup_base_width needs a final norm, whose gain scales the logits; this architecture has none, leave it out"
        )
    if scales_embeddings:
        raise ValueError(
            "mup_base_width with scale_embeddings=true: embeddings would grow with the width; set one of them"
        )
    return d_model / base_width
