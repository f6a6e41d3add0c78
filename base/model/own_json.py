"""graft's own config.json, for models that no architecture of transformers describes: ModelConfig's fields as they are."""

from dataclasses import replace
from typing import Any

from ..json_fields import field
from ..settings import check_settings, plain
from .config import ModelConfig
from .families import Family, family_of

ARCHITECTURE, MODEL_TYPE = "GraftForCausalLM", "graft"
OWN = Family(MODEL_TYPE, experts="qwen")


def layout_of(config: ModelConfig) -> tuple[str, Family]:
    """The architecture that a config is written as: transformers' where one fits, else graft's own."""
    try:
        return family_of(config)
    except ValueError:
        return ARCHITECTURE, OWN


def own_layout_note(config: ModelConfig) -> str | None:
    """What a user should know of a model that only graft opens; None where transformers does."""
    try:
        family_of(config)
    except ValueError as error:
        reason = str(error).partition(";")[0]
        return f"note: {reason}; the folder will be in graft's own layout, which only graft opens"
    return None


def own_to_dict(config: ModelConfig, ids: dict[str, Any], *, dtype: str) -> dict[str, Any]:
    """The whole config.json."""
    fields = plain(replace(config, n_predict=0))  # only training has the layers of further tokens
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "model": {name: value for name, value in fields.items() if value is not None and name not in ids},
        **ids,
        "vocab_size": config.vocab_size,
        "dtype": dtype,
    }


def own_from_dict(raw_config: dict[str, Any], ids: dict[str, Any], where: str) -> ModelConfig:
    """The other way; `ids`: the special tokens, as they are read of every family. Raises ValueError for unknown fields."""
    fields = field(raw_config, "model", dict, where)
    try:
        return ModelConfig(**check_settings(fields, ModelConfig), **ids)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from None
