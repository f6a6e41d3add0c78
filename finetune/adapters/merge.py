"""Fold an adapter into its base's weights: W' = W + scale * B A, in float32, so that nothing is left to add at run time."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ...base.checkpoint import write_json
from ...base.json_fields import read_json
from ...base.model.huggingface import fingerprint, load_config
from ...base.model.transformer import Transformer
from ...base.tokenizer.tokenizer import Tokenizer
from ...quant.linear import NF4Linear
from ...quant.merge import requantize
from ..data.chat import encode_prompt
from ..data.render import ChatTemplate
from ..folders import carry_over, replaced_folder
from ..generate import start_ids
from ..loading import check_finite, check_token_ids, load_model, save_any
from .adapter import EMBEDDING, HEAD
from .bank import AdapterBank
from .dora import merged_weight
from .files import GRAFT, Adapter, check_fits, read_adapter
from .low_rank import weight_of

REPORT = "merge.json"
LARGEST_KL = 0.1  # nats a token: above, the merged model is another one than base and adapter
PROMPTS = (
    "The river runs to the sea, and the sea is wide.",
    "Write a function that returns the sum of a list of numbers.",
    "Is this message spam? You have won a prize, call now!",
    "2 + 2 = 4, 3 + 5 =",
)


@dataclass(frozen=True)
class MergeReport:
    """What merging did; the error is 0 unless the base is in 4 bits."""

    n_layers: int
    relative_error: float  # worst layer: rms of (requantized - exact) over rms of the update


@dataclass(frozen=True)
class Drift:
    """How far the merged model's predictions are from those of base and adapter, on a few prompts."""

    kl: float  # mean over positions of KL(merged || unmerged), in nats
    equal_greedy: float  # share of positions where both give the same token the most probability
    n_tokens: int  # positions compared


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


@torch.no_grad()
def next_token_logp(model: Transformer, prompts: Sequence[Tensor]) -> list[Tensor]:  # each (T, V) float64
    """Log-probabilities of each prompt's next tokens; a prompt is (T,) int64."""
    device = model.model.embed_tokens.weight.device
    return [model(ids[None].to(device))[0].cpu().double().log_softmax(-1) for ids in prompts]


def drift_of(merged: Sequence[Tensor], unmerged: Sequence[Tensor]) -> Drift:
    """Two models' log-probabilities of the same prompts, each (T, V) -> how far apart they are.

    KL(p || q) = sum of p (log p - log q): 0 where the two agree.
    """
    p, q = torch.cat(list(merged)), torch.cat(list(unmerged))
    kl = (p.exp() * (p - q)).sum(-1).mean().item()
    return Drift(
        kl if not kl < 0 else 0.0,  # rounding may leave -1e-17
        (p.argmax(-1) == q.argmax(-1)).double().mean().item(),
        p.shape[0],
    )


def prompts_for(tokenizer: Tokenizer, adapter: Adapter, max_seq_len: int) -> list[Tensor]:
    """PROMPTS as ids, in the form that the adapter was trained on: as a chat's turn, or as plain text."""
    template = ChatTemplate.of(tokenizer, adapter.chat_template)
    is_chat = adapter.graft.get("prompt_format", "text") == "chat"
    return [
        torch.as_tensor(
            encode_prompt([{"role": "user", "content": text}], tokenizer, template).tolist()
            if is_chat
            else start_ids(encode_prompt(text, tokenizer).tolist(), tokenizer)
        )[:max_seq_len]
        for text in PROMPTS
    ]


def run_merge(
    base: Path | str, adapter: Path | str, out: Path | str, *, force: bool = False, allow_drift: bool = False
) -> tuple[MergeReport, Drift]:
    """Merge an adapter folder into its base folder and write a model folder: `graft adapter merge`.

    A base in 4 bits stays in 4 bits. The merged model's predictions are compared with those of base and adapter, and the
    figures are written to merge.json. Raises ValueError for weights that are not finite and, unless `allow_drift`, for
    predictions that are further apart than LARGEST_KL; FileExistsError for an `out` that is not empty. `out` is replaced
    when the new folder is whole.
    """
    base, out = Path(base), Path(out)
    if out.resolve() in (base.resolve(), Path(adapter).resolve()):
        raise ValueError(f"--out {out} is the base or the adapter itself; choose another folder")
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"{out} is a file; give a folder")
    if out.exists() and any(out.iterdir()) and not force:
        raise FileExistsError(f"{out} is not empty; choose another folder or --force")
    loaded = read_adapter(adapter)
    tokenizer = Tokenizer.load(base)
    check_token_ids(tokenizer, load_config(base), where=base)
    prompts = prompts_for(tokenizer, loaded, load_config(base).max_seq_len)
    model = load_model(base, dtype=None)
    check_finite(model, where=base)
    bank = AdapterBank(model)
    bank.load("merged", adapter)
    bank.use("merged")
    unmerged = next_token_logp(model, prompts)
    bank.unload("merged")  # layers are plain linears again
    report = merge(model, loaded)
    check_finite(model, where=f"{base} with {adapter} merged")
    drift = drift_of(next_token_logp(model, prompts), unmerged)
    if not drift.kl <= LARGEST_KL and not allow_drift:
        raise ValueError(
            f"the merged model's predictions differ from those of base and adapter by {drift.kl:.4f} nats a token (at most "
            f"{LARGEST_KL} is accepted; {drift.equal_greedy:.1%} of greedy tokens are equal): the base's "
            "number format has no room for the update; merge into the base in full precision, or pass --allow-drift"
        )
    if loaded.chat_template is not None:
        tokenizer.chat_template = loaded.chat_template
    with replaced_folder(out) as folder:
        tokenizer.save(folder)
        if loaded.graft:
            write_json(folder / GRAFT, {key: value for key, value in loaded.graft.items() if key != "base_fingerprint"})
        save_any(model, folder, stored=read_json(base / "config.json").get("quantization_config"))
        carry_over(base, folder)
        write_json(folder / REPORT, asdict(report) | asdict(drift))
    return report, drift
