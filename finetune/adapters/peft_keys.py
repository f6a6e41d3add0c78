"""adapter_model.safetensors: which key holds what, both ways.

base_model.model.<path>.lora_A.weight, .lora_B.weight         a pair of A (R, in) and B (out, R)
base_model.model.<path>.lora_magnitude_vector                 DoRA's m (out,)
base_model.model.<path>.weight, .bias                         a module of modules_to_save; else PEFT's copy of the base's own
base_model.model.<path>.token_adapter.trainable_tokens_delta  rows (n, D) for trainable_token_indices
prompt_embeddings                                             a prefix (P, n_layers * 2 * K * Dh)
base_model.model.<path>.bottleneck.<part>                     graft's own: down_weight, down_bias, up_weight, up_bias
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ...base.model.huggingface import WEIGHT_DTYPES
from .adapter import EMBEDDING, HEAD
from .bottleneck import PARTS, Bottleneck
from .dora import DoRA
from .own_weights import OwnModule, TokenRows
from .peft_config import saved_names, token_ids_of
from .pissa import Pissa
from .prefix import PrefixKeys, joined_embeddings

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
MAGNITUDE, ROWS, PROMPT = "lora_magnitude_vector", "token_adapter.trainable_tokens_delta", "prompt_embeddings"


@dataclass
class Parts:
    """A file's tensors by what they are; see Adapter."""

    pairs: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # path -> A, B
    copies: dict[str, Tensor] = field(default_factory=dict)
    magnitudes: dict[str, Tensor] = field(default_factory=dict)
    modules: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    token_rows: dict[str, tuple[list[int], Tensor]] = field(default_factory=dict)
    prefix: Tensor | None = None
    bottlenecks: dict[str, dict[str, Tensor]] = field(default_factory=dict)


def sorted_keys(tensors: Mapping[str, Tensor], config: Mapping[str, Any], file: Path) -> Parts:
    """A file's tensors by what they are. Raises ValueError for a key that isn't covered, and for what the config lacks."""
    parts = Parts()
    for key, tensor in tensors.items():
        if tensor.dtype not in WEIGHT_DTYPES:
            raise ValueError(f"{file}: {key} holds {tensor.dtype}; expected float32, bfloat16, float16 or float64")
        if not tensor.isfinite().all():
            raise ValueError(f"{file}: {key} holds NaN or infinity; the training that wrote it diverged, train again")
        if not _place(parts, key, tensor, config, file):
            raise ValueError(
                f"{file}: key {key!r} is not covered; graft reads {PREFIX}<path>.lora_A.weight and .lora_B.weight, and "
                "what the options of adapter_config.json stand for"
            )
    _check_complete(parts, config, file)
    return parts


def _place(parts: Parts, key: str, tensor: Tensor, config: Mapping[str, Any], file: Path) -> bool:
    """Put a tensor where it belongs; False for a key that isn't covered."""
    if config["peft_type"] == "PREFIX_TUNING":
        parts.prefix = tensor
        return key == PROMPT
    if not key.startswith(PREFIX):
        return False
    path, _, last = key.removeprefix(PREFIX).rpartition(".")
    if config["peft_type"] == "BOTTLENECK":
        parts.bottlenecks.setdefault(path.removesuffix(".bottleneck"), {})[last] = tensor
        return path.endswith(".bottleneck") and last in PARTS
    full = key.removeprefix(PREFIX).removesuffix(".weight")
    before, dot, side = full.rpartition(".lora_")
    if dot and side in ("A", "B") and last == "weight":
        parts.pairs.setdefault(before, {})[side] = tensor
        return True
    if config.get("use_dora") and full.endswith(f".{MAGNITUDE}"):  # older files of PEFT add .weight
        parts.magnitudes[full.removesuffix(f".{MAGNITUDE}")] = tensor.flatten()
        return True
    if full.endswith(f".{ROWS}") and config.get("trainable_token_indices"):
        place = full.removesuffix(f".{ROWS}")
        ids = token_ids_of(config, place)
        if ids is None or tensor.ndim != 2 or len(ids) != tensor.shape[0]:
            raise ValueError(
                f"{file}: {key} has {len(tensor)} rows, but trainable_token_indices gives {place} {0 if ids is None else len(ids)}"
            )
        parts.token_rows[place] = ids, tensor
        return True
    if last in ("weight", "bias") and any(path.endswith(name) for name in saved_names(config)):
        parts.modules.setdefault(path, {})[last] = tensor
        return True
    if last == "weight" and path == HEAD and config.get("ensure_weight_tying") and saved_names(config):
        parts.modules.setdefault(path, {})[last] = tensor
        return True
    bare = full.removesuffix(".base_layer")
    if last == "weight" and bare.endswith(("lm_head", "embed_tokens")):
        parts.copies[bare] = tensor
        return True
    return False


def _check_complete(parts: Parts, config: Mapping[str, Any], file: Path) -> None:
    """What the config says is there, and nothing twice."""
    if config.get("use_dora") and (missing := sorted(parts.pairs.keys() ^ parts.magnitudes.keys())):
        raise ValueError(
            f"{file}: use_dora is set, but {missing[0]} has not both A, B and {MAGNITUDE}; the file is incomplete"
        )
    for path, magnitude in parts.magnitudes.items():
        b = parts.pairs[path].get("B")
        if b is not None and magnitude.shape[0] != b.shape[0]:
            raise ValueError(f"{file}: {path}'s {MAGNITUDE} has {magnitude.shape[0]} values for {b.shape[0]} outputs")
    if config.get("trainable_token_indices") and not parts.token_rows:
        raise ValueError(f"{file} has no {ROWS}, which trainable_token_indices stands for; the file is incomplete")
    if config["peft_type"] == "PREFIX_TUNING":
        n = config["num_virtual_tokens"]
        if parts.prefix is None or parts.prefix.ndim != 2 or parts.prefix.shape[0] != n:
            found = "nothing" if parts.prefix is None else tuple(parts.prefix.shape)
            raise ValueError(f"{file}: {PROMPT} is {found}; expected ({n}, layers * 2 * heads * head size)")
    if config["peft_type"] == "BOTTLENECK" and not parts.bottlenecks:
        raise ValueError(f"{file} holds no bottleneck")


def tensors_of(updates: Mapping[str, Any]) -> dict[str, Tensor]:
    """One adapter's updates by path -> the file's tensors."""
    found: dict[str, Tensor] = {}
    prefixes = [update for update in updates.values() if isinstance(update, PrefixKeys)]
    if prefixes:
        return {PROMPT: joined_embeddings(prefixes).detach()}
    for path, update in updates.items():
        start = f"{PREFIX}{path}."
        if isinstance(update, OwnModule):
            found |= {start + name: tensor for name, tensor in update.named_parameters()}
        elif isinstance(update, TokenRows):
            if path == HEAD and _is_shared(updates, update):
                continue
            found[start + ROWS] = update.rows
        elif isinstance(update, Bottleneck):
            found |= {f"{start}bottleneck.{name}": tensor for name, tensor in update.named_parameters()}
        else:
            a, b = update.factors() if isinstance(update, Pissa) else (update.lora_a, update.lora_b)
            found |= {f"{start}lora_A.weight": a, f"{start}lora_B.weight": b}
            if isinstance(update, DoRA):
                found[start + MAGNITUDE] = update.magnitude
    # A tensor of two names (a tied head in modules_to_save) is written twice, as PEFT writes it.
    seen: set[int] = set()
    for key, tensor in found.items():
        found[key] = tensor.detach().clone() if id(tensor) in seen else tensor.detach()
        seen.add(id(tensor))
    return found


def _is_shared(updates: Mapping[str, nn.Module], update: TokenRows) -> bool:
    other = updates.get(EMBEDDING)
    return isinstance(other, TokenRows) and other.rows is update.rows
