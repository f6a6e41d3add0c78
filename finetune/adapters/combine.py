"""Several adapters of one base into one: weighted sums of their matrices, concatenation, TIES and DARE.

The update that is meant is sum_i w_i * scale_i * B_i A_i. `cat` gives it exactly, with the sum of the ranks. `linear` keeps the
rank and sums A and B apart, (sum_i sqrt(w_i s_i) B_i)(sum_i sqrt(w_i s_i) A_i), which has cross terms B_i A_j; `ties` and `dare`
first thin the matrices out. How far the predictions are from the meant ones is measured and recorded.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...base.checkpoint import write_json
from ...base.model.huggingface import fingerprint
from ...base.model.transformer import Transformer
from ...base.tokenizer.tokenizer import Tokenizer
from ..folders import replaced_folder
from ..loading import load_model
from .files import Adapter, check_fits, read_adapter, save_adapter
from .lora import LoraConfig, LowRank, remove_adapter, wrapped
from .merge import drift_of, next_token_logp
from .selection import use_adapters

Layers = dict[str, tuple[Tensor, Tensor, float]]  # path -> A (R, in), B (out, R), scale
METHODS = ("linear", "cat", "ties", "dare")
REPORT = "merge.json"
LARGEST_KL = 0.5  # nats a token between the result and the weighted sum that is meant
TEXTS = (
    "The river runs to the sea, and the sea is wide.",
    "Is this message spam? You have won a prize, call now!",
    "Write a short letter to a friend about the last summer.",
)


def run_combine(
    *,
    base: Path | str,
    adapters: Sequence[Path | str],
    weights: Sequence[float] | None = None,  # None: equal ones
    method: str = "linear",
    out: Path | str,
    density: float = 0.5,  # ties, dare: the share of numbers that stay
    seed: int = 0,  # dare: which ones
    text: Path | str | None = None,  # held-out text to compare predictions on; None: a few sentences
    any_sum: bool = False,  # whether weights may add up to something else than 1
    allow_drift: bool = False,
    force: bool = False,
) -> dict[str, Any]:
    """`graft.merge`: combine adapter folders into one PEFT folder `out`; returns the report, which merge.json holds too.

    `kl` is KL(result || weighted sum of the updates) in nats a token, `equal_tokens` the share of equal greedy tokens. Raises
    ValueError for adapters of other bases or targets, weights that don't fit and, unless `allow_drift`, a kl above LARGEST_KL;
    FileExistsError for an `out` that is not empty.
    """
    out = Path(out)
    shares = check_weights(adapters, weights, any_sum=any_sum)
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; choose {', '.join(METHODS)}")
    if out.resolve() in {Path(folder).resolve() for folder in (base, *adapters)}:
        raise ValueError(f"out {out} is the base or one of the adapters; choose another folder")
    if out.exists() and any(out.iterdir()) and not force:
        raise FileExistsError(f"{out} is not empty; choose another folder or --force")
    loaded = [read_adapter(folder) for folder in adapters]
    model = load_model(base, dtype=None)
    for adapter in loaded:
        check_fits(adapter, model, fingerprint=fingerprint(model))
    layers = combine(loaded, shares, method, density=density, seed=seed)
    meant = combine(loaded, shares, "cat")
    rows = held_out(Tokenizer.load(base), text, model.config.max_seq_len)
    kl, equal = drift(model, layers, meant, rows)
    report = {
        "method": method,
        "adapters": [str(folder) for folder in adapters],
        "weights": shares,
        "rank": max(a.shape[0] for a, _, _ in layers.values()),
        "kl": kl,
        "equal_tokens": equal,
        "n_tokens": sum(len(row) for row in rows),
    }
    if not kl <= LARGEST_KL and not allow_drift:
        raise ValueError(
            f"the combined adapter's predictions are {kl:.3f} nats a token from the weighted sum of the updates (at most "
            f"{LARGEST_KL} is accepted; {equal:.1%} of greedy tokens are equal); use method cat, which is exact, or allow_drift"
        )
    graft = {
        key: value for key, value in loaded[0].graft.items() if key in ("base_fingerprint", "prompt_format", "method")
    }
    with replaced_folder(out) as folder:
        write_adapter(model, layers, folder, base=base, graft=graft | {"combined": report["adapters"]},
                      chat_template=loaded[0].chat_template)  # fmt: skip
        write_json(folder / REPORT, report)
    return report


def check_weights(adapters: Sequence[object], weights: Sequence[float] | None, *, any_sum: bool) -> list[float]:
    """One weight for each adapter. Raises ValueError for other counts, no adapter, and sums that aren't 1."""
    if not adapters:
        raise ValueError("no adapter to merge; give at least one folder")
    shares = [1 / len(adapters)] * len(adapters) if weights is None else [float(weight) for weight in weights]
    if len(shares) != len(adapters):
        raise ValueError(f"{len(shares)} weights for {len(adapters)} adapters; give one for each")
    if wrong := [weight for weight in shares if not math.isfinite(weight)]:
        raise ValueError(f"weight {wrong[0]} is not finite")
    if abs(sum(shares) - 1) > 1e-3 and not any_sum:
        raise ValueError(f"weights {shares} add up to {sum(shares):g}; give weights that add up to 1, or set any_sum")
    return shares


def combine(
    adapters: Sequence[Adapter], weights: Sequence[float], method: str, *, density: float = 0.5, seed: int = 0
) -> Layers:
    """The combined adapter's layers, float32, with scale 1. Raises ValueError for other targets or, but for cat, other ranks."""
    if not 0 < density <= 1:
        raise ValueError(f"density={density} must lie in (0, 1]")
    for adapter in adapters:
        adapter.check_plain("combined with others")
    first = adapters[0]
    for other in adapters[1:]:
        if different := sorted(first.layers.keys() ^ other.layers.keys()):
            raise ValueError(
                f"adapters {first.where} and {other.where} have different targets: only one of them has {different[0]}; "
                "merge adapters of the same targets"
            )
    generator = torch.Generator().manual_seed(seed)
    found: Layers = {}
    for path in first.layers:
        parts = [adapter.layers[path] for adapter in adapters]
        factors = [weight * scale for weight, (_, _, scale) in zip(weights, parts, strict=True)]
        if method == "cat":
            a = torch.cat([factor * a.float() for factor, (a, _, _) in zip(factors, parts, strict=True)])
            found[path] = a, torch.cat([b.float() for _, b, _ in parts], dim=1), 1.0
            continue
        ranks = {a.shape[0] for a, _, _ in parts}
        if len(ranks) > 1:
            raise ValueError(f"{path} has ranks {sorted(ranks)}; {method} needs equal ranks, use method cat")
        # A negative weight's sign goes to A alone: on both sides it would cancel.
        roots_b = [math.sqrt(abs(factor)) for factor in factors]
        roots_a = [math.copysign(root, factor) for root, factor in zip(roots_b, factors, strict=True)]
        a, b = torch.stack([a.float() for a, _, _ in parts]), torch.stack([b.float() for _, b, _ in parts])
        found[path] = (
            _mixed(a, roots_a, method, density, generator),
            _mixed(b, roots_b, method, density, generator),
            1.0,
        )
    return found


def _mixed(
    tensors: Tensor,  # (n, ...), one adapter's matrix each
    weights: Sequence[float],
    method: str,
    density: float,
    generator: torch.Generator,
) -> Tensor:
    """linear: the weighted sum. dare: of matrices with numbers dropped at random and the rest scaled up (Yu et al. 2023,
    arXiv:2311.03099, section 3). ties: of the largest numbers that agree with the majority's sign, divided by how many do
    (Yadav et al. 2023, arXiv:2306.01708, section 4)."""
    factors = torch.tensor(weights).view(-1, *[1] * (tensors.ndim - 1))
    if method == "linear":
        return (tensors * factors).sum(0)
    if method == "dare":
        kept = torch.empty_like(tensors).bernoulli_(density, generator=generator)
        return (tensors * kept / density * factors).sum(0)
    tops = torch.zeros_like(tensors).flatten(1)
    if n_kept := int(density * tops.shape[1]):
        flat = tensors.flatten(1)
        chosen = flat.abs().topk(n_kept, dim=1).indices
        tops.scatter_(1, chosen, flat.gather(1, chosen))
    tops = tops.view_as(tensors)
    elected = torch.where(tops.sum(0) >= 0, 1.0, -1.0)
    agrees = tops.sign() == elected
    return (tops * factors * agrees).sum(0) / agrees.sum(0).clamp(min=1)


# --- how far apart -------------------------------------------------------------------------------------------------


def held_out(tokenizer: Tokenizer, text: Path | str | None, max_seq_len: int) -> list[Tensor]:
    """Rows of ids to compare predictions on. Raises ValueError for a file without text."""
    texts = TEXTS if text is None else [Path(text).read_text(encoding="utf-8")]
    ids = [torch.as_tensor(tokenizer.encode(one).tolist(), dtype=torch.int64) for one in texts]
    rows = [row for whole in ids for row in whole.split(min(max_seq_len, 512))[:16] if len(row)]
    if not rows:
        raise ValueError(f"{text} holds no text to compare predictions on")
    return rows


def attach_layers(model: Transformer, name: str, layers: Layers) -> None:
    """Give the model an adapter of these layers; it acts where it is chosen."""
    device = model.model.embed_tokens.weight.device
    for path, (a, b, scale) in layers.items():
        wrapped(model, path).add(name, LowRank(a.to(device), b.to(device), scale, trained=False))


def drift(model: Transformer, layers: Layers, meant: Layers, rows: Sequence[Tensor]) -> tuple[float, float]:
    """KL(base + layers || base + meant) in nats a token, and the share of equal greedy tokens. Leaves no adapter behind."""
    attach_layers(model, "meant", meant)
    try:
        with use_adapters(model, "meant"):
            unmerged = next_token_logp(model, rows)
    finally:
        remove_adapter(model, "meant")
    return _compare(model, layers, unmerged, rows)


def drift_between(
    model: Transformer, layers: Layers, other: Transformer, rows: Sequence[Tensor]
) -> tuple[float, float]:
    """The same between base + layers and another model."""
    return _compare(model, layers, next_token_logp(other, rows), rows)


def _compare(
    model: Transformer, layers: Layers, expected: Sequence[Tensor], rows: Sequence[Tensor]
) -> tuple[float, float]:
    attach_layers(model, "result", layers)
    try:
        with use_adapters(model, "result"):
            found = drift_of(next_token_logp(model, rows), expected)
    finally:
        remove_adapter(model, "result")
    return found.kl, found.equal_greedy


def write_adapter(
    model: Transformer,
    layers: Layers,
    folder: Path,
    *,
    base: Path | str,
    graft: dict[str, Any],
    chat_template: str | None = None,
) -> None:
    """Write layers of scale 1 as a PEFT folder of one rank, smaller ones padded with zeros."""
    rank = max(a.shape[0] for a, _, _ in layers.values())
    padded = {
        path: (F.pad(a, (0, 0, 0, rank - a.shape[0])), F.pad(b, (0, rank - b.shape[1])), scale)
        for path, (a, b, scale) in layers.items()
    }
    attach_layers(model, "written", padded)
    config = LoraConfig(rank=rank, alpha=float(rank))
    save_adapter(
        model, folder, config, base=str(Path(base).resolve()), name="written", graft=graft, chat_template=chat_template
    )
    remove_adapter(model, "written")


def parse_stack(spec: str) -> dict[str, float]:
    """'spam:0.7,style:0.3' -> {'spam': 0.7, 'style': 0.3}. Raises ValueError for what is not that."""
    found: dict[str, float] = {}
    for part in spec.split(","):
        name, colon, number = part.strip().rpartition(":")
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not (colon and name and math.isfinite(weight)):
            raise ValueError(
                f"stack {spec!r}: {part.strip()!r} is not NAME:WEIGHT; write for example spam:0.7,style:0.3"
            )
        if name in found:
            raise ValueError(f"stack {spec!r} names {name} twice; add its weights up")
        found[name] = weight
    return found


def stacked_adapter(spec: str, load: Callable[[str], Adapter]) -> Adapter:
    """The weighted sum that a spec such as spam:0.7,style:0.3 means, as one adapter (concatenated, so exact).

    Raises ValueError for a spec that is none, or adapters of different targets.
    """
    weights = parse_stack(spec)
    adapters = [load(name) for name in weights]
    return replace(adapters[0], layers=combine(adapters, list(weights.values()), "cat"), where=spec, copies={})
