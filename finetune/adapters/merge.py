"""Fold an adapter into its base's weights: W' = W + scale * B A, in float32, so that nothing is left to add at run time."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ...base.checkpoint import write_json
from ...base.hub import model_folder
from ...base.json_fields import read_json
from ...base.model.huggingface import fingerprint, load_config
from ...base.model.transformer import Transformer
from ...base.tokenizer.tokenizer import Tokenizer
from ...quant.linear import NF4Linear
from ...quant.merge import requantize
from ..folders import carry_over, replaced_folder
from ..loading import check_finite, check_token_ids, load_model, save_any
from .adapter import EMBEDDING, HEAD
from .bank import AdapterBank
from .dora import merged_weight
from .drift import Drift, check_drift, check_out, drift_from, held_out_rows, next_token_logp
from .files import GRAFT, Adapter, check_fits, read_adapter
from .low_rank import weight_of

REPORT = "merge.json"
LARGEST_KL = 0.1  # nats a token: above, the merged model is another one than base and adapter


@dataclass(frozen=True)
class MergeReport:
    """What merging did; the error is 0 unless the base is in 4 bits."""

    n_layers: int
    relative_error: float  # worst layer: rms of (requantized - exact) over rms of the update


def merge(model: Transformer, adapter: Adapter) -> MergeReport:
    """Merge in place. A 4-bit layer is dequantized, added to and quantized again, and the error of that is measured.

    Raises ValueError when the adapter was made for another base, or is no change of weights (a prefix, a bottleneck).
    """
    check_fits(adapter, model, fingerprint=fingerprint(model))
    if adapter.prefix is not None or adapter.bottlenecks:
        raise ValueError(
            f"adapter {adapter.where} is no change of weights (peft_type={adapter.config['peft_type']}) and can't be merged; use "
            "it beside its base"
        )
    worst = 0.0
    for path, (a, b, scale) in adapter.layers.items():
        module = model.get_submodule(path)
        delta = scale * (b.float() @ a.float())  # (out, in)
        if path in adapter.magnitudes:
            weight = weight_of(module)
            delta = merged_weight(weight.cpu(), a, b, scale, adapter.magnitudes[path]) - weight.cpu()
        if isinstance(module, NF4Linear):
            packed, state, error = requantize(module, delta)
            module.set_packed_(packed, state)
            worst = max(worst, error.of_update)
        else:
            assert isinstance(module, nn.Linear)
            if path == HEAD and model.config.tie_embeddings:
                untie(model)
            with torch.no_grad():
                merged = module.weight.float() + delta.to(module.weight.device)
                module.weight.copy_(merged.to(module.weight.dtype))
    _put_own_weights(model, adapter)
    return MergeReport(len(adapter.layers) + len(adapter.modules) + len(adapter.token_rows), worst)


@torch.no_grad()
def _put_own_weights(model: Transformer, adapter: Adapter) -> None:
    """The modules and rows that the adapter brings take the place of the base's; a tied head stays tied where both are equal."""
    tied = model.config.tie_embeddings
    pair = adapter.modules.get(EMBEDDING), adapter.modules.get(HEAD)
    stays = adapter.shares_head(tied) or (None not in pair and torch.equal(pair[0]["weight"], pair[1]["weight"]))  # pyright: ignore[reportOptionalSubscript]
    if tied and pair != (None, None) and not stays:
        untie(model)
    rows = {*adapter.token_rows} & {EMBEDDING, HEAD}
    if tied and rows and rows != {EMBEDDING}:
        untie(model)
    for path, tensors in adapter.modules.items():
        for name, tensor in tensors.items():
            model.get_submodule(path).get_parameter(name).copy_(tensor)
    for path, (ids, own) in adapter.token_rows.items():
        weight = model.get_submodule(path).get_parameter("weight")
        weight[torch.tensor(ids)] = own.to(weight.device, weight.dtype)


def untie(model: Transformer) -> Tensor:
    """Give lm_head its own copy of the embedding: merging into a shared weight would change the input side too."""
    if not model.config.tie_embeddings:
        return model.lm_head.weight
    model.lm_head.weight = nn.Parameter(model.model.embed_tokens.weight.detach().clone())
    model.config = replace(model.config, tie_embeddings=False)
    return model.lm_head.weight


def run_merge(
    base: Path | str,
    adapter: Path | str,
    out: Path | str,
    *,
    text: Path | str | None = None,  # held-out text or records to compare predictions on; None: a few prompts
    force: bool = False,
    allow_drift: bool = False,
) -> tuple[MergeReport, Drift]:
    """Merge an adapter folder into its base folder and write a model folder: `graft adapter merge`.

    A base in 4 bits stays in 4 bits. What was written is read back, and its predictions are compared with those of base and
    adapter; the figures are in merge.json. Raises ValueError for weights that are not finite and, unless `allow_drift`, for
    predictions that are further apart than LARGEST_KL; FileExistsError for an `out` that is not empty. `out` is replaced
    when the new folder is whole.
    """
    base, out = model_folder(base), Path(out)
    if out.resolve() in (base.resolve(), Path(adapter).resolve()):
        raise ValueError(f"--out {out} is the base or the adapter itself; choose another folder")
    check_out(out, {}, force=force)
    loaded = read_adapter(adapter)
    return merge_into(base, loaded, loaded, out, text=text, largest_kl=LARGEST_KL, allow_drift=allow_drift)


def merge_into(
    base: Path,
    adapter: Adapter,
    meant: Adapter,  # whose predictions the result should have; the adapter itself, or a sum that it approximates
    out: Path,
    *,
    text: Path | str | None,
    largest_kl: float,
    allow_drift: bool,
    report: Mapping[str, object] | None = None,  # more for merge.json
) -> tuple[MergeReport, Drift]:
    """`run_merge` for adapters that were read already. One model is in memory at a time."""
    tokenizer, config = Tokenizer.load(base), load_config(base)
    check_token_ids(tokenizer, config, where=base)
    rows = held_out_rows(tokenizer, config, text, adapter)
    expected = unmerged_logp(base, meant, rows)
    model = load_model(base, dtype=None)
    done = merge(model, adapter)
    check_finite(model, where=f"{base} with {adapter.where} merged")
    if adapter.chat_template is not None:
        tokenizer.chat_template = adapter.chat_template
    with replaced_folder(out) as folder:
        tokenizer.save(folder)
        if adapter.graft:
            write_json(
                folder / GRAFT, {key: value for key, value in adapter.graft.items() if key != "base_fingerprint"}
            )
        save_any(model, folder, stored=read_json(base / "config.json").get("quantization_config"))
        carry_over(base, folder)
        del model
        drift = drift_from(expected, load_model(folder), rows)
        check_drift(
            drift,
            largest_kl,
            what="the merged model's predictions differ from those of base and adapter",
            way_out="the base's number format has no room for the update; merge into the base in full precision",
            allow=allow_drift,
        )
        write_json(folder / REPORT, dict(report or {}) | asdict(done) | drift.figures(text))
    return done, drift


def unmerged_logp(base: Path, adapter: Adapter, rows: Sequence[Tensor]) -> list[Tensor]:  # each (T, V)
    """What base and adapter predict, in float32. Raises ValueError for a base with NaN, or one that is not the adapter's."""
    model = load_model(base)
    check_finite(model, where=base)
    bank = AdapterBank(model)
    bank.add("unmerged", adapter)
    bank.use("unmerged")
    return next_token_logp(model, rows)
