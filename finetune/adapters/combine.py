"""Several adapters of one base into one: weighted sums of their matrices, concatenation, TIES and DARE.

The update that is meant is sum_i w_i * scale_i * B_i A_i. `cat` gives it exactly, with the sum of the ranks. `linear` keeps the
rank and sums A and B apart, (sum_i sqrt(w_i s_i) B_i)(sum_i sqrt(w_i s_i) A_i), which has cross terms B_i A_j; `ties` and `dare`
first thin the matrices out. How far the predictions are from the meant ones is measured and recorded.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...base.checkpoint import write_json
from ...base.hub import model_folder, name_of
from ...base.model.huggingface import empty_model, fingerprint, load_config
from ...base.model.transformer import Transformer
from ...base.tokenizer.tokenizer import Tokenizer
from ..folders import replaced_folder
from ..loading import check_finite, load_model
from .drift import check_drift, check_out, drift_of, held_out_rows, next_token_logp
from .files import Adapter, check_fits, read_adapter, save_adapter
from .lora import LoraConfig, LowRank, remove_adapter, wrapped
from .merge import merge_into
from .selection import use_adapters

Layers = dict[str, tuple[Tensor, Tensor, float]]  # path -> A (R, in), B (out, R), scale
METHODS = ("linear", "cat", "ties", "dare")
REPORT = "merge.json"
LARGEST_KL = 0.5  # nats a token between the result and the weighted sum that is meant
INTO = ("adapter", "base")


def run_combine(
    *,
    base: Path | str,
    adapters: Sequence[Path | str],
    weights: Sequence[float] | None = None,  # None: equal ones
    method: str = "linear",
    out: Path | str,
    into: str = "adapter",  # or base: a model folder that needs no adapter
    density: float = 0.5,  # ties, dare: the share of numbers that stay
    seed: int = 0,  # dare: which ones
    text: Path | str | None = None,  # held-out text or records to compare predictions on; None: a few prompts
    any_sum: bool = False,  # whether weights may add up to something else than 1
    allow_drift: bool = False,
    force: bool = False,
) -> dict[str, Any]:
    """`graft.merge`: combine adapter folders into one PEFT folder `out`, or into the base; returns the report, which merge.json
    holds too.

    `kl` is KL(result || weighted sum of the updates) in nats a token, `equal_tokens` the share of equal greedy tokens, both of
    what was written, read back. Raises ValueError for adapters of other bases or targets, weights that don't fit and, unless
    `allow_drift`, a kl above LARGEST_KL; FileExistsError for an `out` that is not empty.
    """
    base, out = Path(base), Path(out)
    shares = check_weights(adapters, weights, any_sum=any_sum)
    for value, known, name in ((method, METHODS, "method"), (into, INTO, "into")):
        if value not in known:
            raise ValueError(f"unknown {name} {value!r}; choose {', '.join(known)}")
    if out.resolve() in {Path(folder).resolve() for folder in (base, *adapters)}:
        raise ValueError(f"out {out} is the base or one of the adapters; choose another folder")
    check_out(out, {}, force=force)
    loaded = [read_adapter(folder) for folder in adapters]
    made_for = check_one_base(loaded)
    model = empty_model(load_config(base))
    for adapter in loaded:
        check_fits(replace(adapter, copies={}), model)
    result = _as_one(loaded, combine(loaded, shares, method, density=density, seed=seed), made_for)
    meant = _as_one(loaded, combine(loaded, shares, "cat"), made_for)
    report = {
        "method": method,
        "adapters": [str(folder) for folder in adapters],
        "weights": shares,
        "rank": max(a.shape[0] for a, _, _ in result.layers.values()),
    }
    if into == "base":
        done, drift = merge_into(
            base, result, meant, out, text=text, largest_kl=LARGEST_KL, allow_drift=allow_drift, report=report
        )
        return report | asdict(done) | drift.figures(text)
    return report | _write_combined(base, result, meant, out, text, report, allow_drift)


def check_one_base(adapters: Sequence[Adapter]) -> str | None:
    """The fingerprint of the base that they were trained on, if any says so. Raises ValueError for different ones."""
    known = [(one, one.graft["base_fingerprint"]) for one in adapters if one.graft.get("base_fingerprint")]
    for one, made_for in known[1:]:
        if made_for != known[0][1]:
            raise ValueError(
                f"adapter {one.where} was trained on another base than {known[0][0].where} (fingerprint {made_for}, not "
                f"{known[0][1]}); merge adapters of one base"
            )
    return known[0][1] if known else None


def _as_one(adapters: Sequence[Adapter], layers: Layers, made_for: str | None) -> Adapter:
    """Layers of one adapter, with the first one's chat template and what all were trained with."""
    about = ("prompt_format", "method", "template_args")
    graft: dict[str, Any] = {key: value for key, value in adapters[0].graft.items() if key in about}
    graft |= {"base_fingerprint": made_for} if made_for else {}
    return replace(
        adapters[0], layers=layers, graft=graft | {"combined": [one.where for one in adapters]}, copies={},
        where=" + ".join(one.where for one in adapters),
    )  # fmt: skip


def _write_combined(
    base: Path,
    result: Adapter,
    meant: Adapter,
    out: Path,
    text: Path | str | None,
    report: Mapping[str, Any],
    allow_drift: bool,
) -> dict[str, Any]:
    """Write the combined adapter as a PEFT folder once its predictions have been compared; returns the figures."""
    config = load_config(base)
    rows = held_out_rows(Tokenizer.load(base), config, text, result)
    model = load_model(base)
    check_finite(model, where=base)
    made_for = fingerprint(model)
    for adapter in (result, meant):
        check_fits(adapter, model, fingerprint=made_for)
    expected = logp_with(model, meant.layers, rows)
    with replaced_folder(out) as folder:
        write_adapter(model, result.layers, folder, base=base, graft=result.graft, chat_template=result.chat_template)
        drift = drift_of(logp_with(model, read_adapter(folder).layers, rows), expected)
        check_drift(
            drift,
            LARGEST_KL,
            what="the combined adapter's predictions differ from the weighted sum of the updates",
            way_out="use method cat, which is exact",
            allow=allow_drift,
        )
        write_json(folder / REPORT, dict(report) | drift.figures(text))
    return drift.figures(text)


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


def attach_layers(model: Transformer, name: str, layers: Layers) -> None:
    """Give the model an adapter of these layers; it acts where it is chosen."""
    device = model.model.embed_tokens.weight.device
    for path, (a, b, scale) in layers.items():
        wrapped(model, path).add(name, LowRank(a.to(device), b.to(device), scale, trained=False))


def logp_with(model: Transformer, layers: Layers, rows: Sequence[Tensor]) -> list[Tensor]:  # each (T, V)
    """What the model predicts with an adapter of these layers, which is not left behind."""
    attach_layers(model, "compared", layers)
    try:
        with use_adapters(model, "compared"):
            return next_token_logp(model, rows)
    finally:
        remove_adapter(model, "compared")


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
    folder_of_base = model_folder(base)
    name = name_of(folder_of_base) or str(folder_of_base.resolve())
    save_adapter(model, folder, config, base=name, name="written", graft=graft, chat_template=chat_template)
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
    made_for = check_one_base(adapters)
    one = _as_one(adapters, combine(adapters, list(weights.values()), "cat"), made_for)
    return replace(one, where=spec)


def read_stack(spec: Path | str) -> Adapter:
    """An adapter folder, or several with weights, such as runs/spam:0.7,runs/style:0.3. Raises as read_adapter does, and
    ValueError for adapters of different bases or targets."""
    if not Path(spec).exists() and ":" in str(spec):
        return stacked_adapter(str(spec), read_adapter)
    return read_adapter(spec)
