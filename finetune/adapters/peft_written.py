"""The adapter_config.json that graft writes."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from .adapter import EMBEDDING, HEAD
from .bottleneck import Bottleneck
from .config import LoraConfig
from .own_weights import OwnModule, TokenRows
from .prefix import PrefixKeys
from .targets import linears


def peft_config_of(
    config: LoraConfig, updates: Mapping[str, nn.Module], model: nn.Module, *, base: str
) -> dict[str, Any]:
    """The config of one adapter, whose updates are given by path; `base` is a folder or hub name, for PEFT to find it."""
    shared = {"task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True, "revision": None}
    first = next(iter(updates.values()))
    if isinstance(first, PrefixKeys):
        n_heads, d_head = first.keys.shape[1:]
        return shared | {
            "peft_type": "PREFIX_TUNING",
            "num_virtual_tokens": first.keys.shape[0],
            "num_layers": len(updates),
            "num_attention_heads": n_heads,
            "token_dim": n_heads * d_head,
            "encoder_hidden_size": n_heads * d_head,
            "num_transformer_submodules": 1,
            "prefix_projection": False,
        }
    if isinstance(first, Bottleneck):
        return shared | {
            "peft_type": "BOTTLENECK",
            "bottleneck_size": first.down_weight.shape[0],
            "bottleneck_dropout": first.dropout,
            "non_linearity": "gelu",
        }
    return shared | _lora(config, updates, model)


def _lora(config: LoraConfig, updates: Mapping[str, nn.Module], model: nn.Module) -> dict[str, Any]:
    paths = [path for path, update in updates.items() if not isinstance(update, OwnModule | TokenRows)]
    factor = 2 if config.init == "pissa" else 1  # written as a plain LoRA of twice the rank, with the same scale
    alpha_factor = factor**0.5 if config.rank_stabilized else factor  # alpha / sqrt(2 rank) must stay
    tied = config.ensure_weight_tying and EMBEDDING in updates and HEAD in updates
    return {
        "peft_type": "LORA",
        "r": config.rank * factor,
        "lora_alpha": _number(config.alpha * alpha_factor),
        "lora_dropout": config.dropout,
        "target_modules": _target_modules(paths, model),
        "use_rslora": config.rank_stabilized,
        "use_dora": config.use_dora,
        "bias": "none",
        "modules_to_save": list(config.modules_to_save) or None,
        "trainable_token_indices": list(config.trainable_token_indices) or None,
        "ensure_weight_tying": tied,
        "rank_pattern": {name: rank * factor for name, rank in (config.rank_pattern or {}).items()},
        "alpha_pattern": {name: _number(alpha * alpha_factor) for name, alpha in (config.alpha_pattern or {}).items()},
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "layers_to_transform": None,  # target_modules names the layers' linears in full where they are not all meant
        "layers_pattern": None,
    }


def _number(value: float) -> float:
    """2.0 -> 2, as PEFT writes alphas."""
    return int(value) if float(value).is_integer() else value


def _target_modules(paths: list[str], model: nn.Module) -> list[str]:
    """Short names when they mean exactly these layers to PEFT, which matches by suffix; else the whole paths."""
    leaves = list(dict.fromkeys(path.rpartition(".")[2] for path in paths))
    meant = {path for path, _ in linears(model) if path.rpartition(".")[2] in leaves}
    return leaves if meant == set(paths) else paths
