"""adapter_config.json: what each key of PEFT's LoraConfig and PrefixTuningConfig (0.21) means here, and which are refused by name.

A key is read here, or it can't change what a loaded adapter computes, or it must have its neutral value; any other key is
refused unless its value is empty (null, false, 0, "", [] or {}), since a later PEFT may have given it a meaning.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

CONFIG = "adapter_config.json"
READ = (
    "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "use_dora", "modules_to_save",
    "trainable_token_indices", "ensure_weight_tying",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "init_lora_weights", "eva_config",
)  # fmt: skip
NO_EFFECT = (  # on a loaded adapter's result
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "lora_dropout",  # acts in training only
    "megatron_core", "qalora_group_size",  # of megatron_config and use_qalora, which must be neutral
    "runtime_config",
)  # fmt: skip
NEUTRAL: dict[str, tuple[object, ...]] = {  # these would change the result, and aren't implemented
    "fan_in_fan_out": (False, None), "bias": ("none", None), "megatron_config": (None, {}),
    "loftq_config": (None, {}), "corda_config": (None, {}),
    "lora_ga_config": (None, {}), "velora_config": (None, {}), "alora_invocation_tokens": (None,),
    "use_qalora": (False, None), "monteclora_config": (None, {}), "layer_replication": (None, []), "lora_bias": (False, None),
    "target_parameters": (None, []), "use_bdlora": (None, False, {}), "arrow_config": (None, {}), "kasa_config": (None, {}),
}  # fmt: skip
# The same for the other kinds, by peft_type: what is read, and what must have one of the values.
OTHER_KINDS: dict[str, tuple[tuple[str, ...], dict[str, tuple[object, ...]]]] = {
    "PREFIX_TUNING": (
        # prefix_projection and encoder_hidden_size describe how it was trained; the file holds the result
        ("num_virtual_tokens", "num_layers", "num_attention_heads", "token_dim",
         "prefix_projection", "encoder_hidden_size", "init_weights"),
        {"num_transformer_submodules": (1, None), "modules_to_save": (None, [])},
    ),
    "BOTTLENECK": (("bottleneck_size", "bottleneck_dropout"), {"non_linearity": ("gelu",)}),
}  # fmt: skip
# Ways to draw A and B that leave the base as it is; the others (pissa, olora, corda, loftq, lora_ga, ...) change it.
INITIALIZATIONS = (True, False, None, "gaussian", "eva", "orthogonal")
# What PEFT takes when target_modules is null, for each architecture that graft reads.
DEFAULT_TARGETS = ("q_proj", "v_proj")
ALL_LINEAR = "all-linear"


def check_config(config: Mapping[str, Any], *, where: str) -> None:
    """Raise ValueError for an option that isn't covered, by name, and for a value of the wrong type."""
    kind = config.get("peft_type")
    if kind != "LORA" and not (isinstance(kind, str) and kind in OTHER_KINDS):
        raise ValueError(f"{where}: peft_type {kind!r} is not covered; graft reads LORA, {', '.join(OTHER_KINDS)}")
    read, neutral = (READ, NEUTRAL) if kind == "LORA" else OTHER_KINDS[str(kind)]
    for key, value in config.items():
        if key in read or key in NO_EFFECT or key == "peft_type":
            continue
        if key in neutral:
            if not any(_same(value, one) for one in neutral[key]):
                raise ValueError(f"{where}: {key}={value!r} is not covered; merge that adapter in PEFT first")
        elif value:
            raise ValueError(
                f"{where}: unknown key {key}={value!r} may change the result; if it doesn't, remove it from the file"
            )
    if kind != "LORA":
        _check_numbers(config, where)
        return
    init = config.get("init_lora_weights")
    if not any(_same(init, known) for known in INITIALIZATIONS):
        raise ValueError(f"{where}: init_lora_weights={init!r} is not covered; merge that adapter in PEFT first")
    if config.get("eva_config") not in (None, {}) and init != "eva":
        raise ValueError(f"{where}: eva_config={config['eva_config']!r} without init_lora_weights='eva' is not covered")
    _check_types(config, where)
    if config.get("ensure_weight_tying") and any(is_target(config, path) for path in ("lm_head", "model.embed_tokens")):
        raise ValueError(
            f"{where}: ensure_weight_tying with a target_modules that names the head is not covered; merge it in PEFT first"
        )


def _check_numbers(config: Mapping[str, Any], where: str) -> None:
    """The sizes of a prefix or a bottleneck are whole numbers of at least 1."""
    sizes = {
        "PREFIX_TUNING": ("num_virtual_tokens", "num_layers", "num_attention_heads"),
        "BOTTLENECK": ("bottleneck_size",),
    }
    for key in sizes[config["peft_type"]]:
        if not _is_rank(config.get(key)):
            raise ValueError(f"{where}: {key}={config.get(key)!r}; expected a whole number of at least 1")


def _same(value: object, neutral: object) -> bool:
    """Equality that tells 0 from False."""
    return type(value) is type(neutral) and value == neutral


def _check_types(config: Mapping[str, Any], where: str) -> None:
    def check(key: str, fits: Callable[[Any], bool], expected: str) -> None:
        if key in config and not fits(config[key]):
            raise ValueError(f"{where}: {key}={config[key]!r}; expected {expected}")

    check("r", _is_rank, "a whole number of at least 1")
    check("lora_alpha", _is_number, "a finite number")
    for key in ("use_rslora", "use_dora", "ensure_weight_tying"):
        check(key, lambda v: v is None or isinstance(v, bool), "true or false")
    check("modules_to_save", lambda v: not isinstance(v, str) and _are_names(v), "a list of names or null")
    check(
        "trainable_token_indices",
        lambda v: v is None or _are_ids(v) or (isinstance(v, dict) and all(map(_are_ids, v.values()))),
        "a list of token ids, an object of such lists or null",
    )
    check("rank_pattern", lambda v: _is_table(v, _is_rank), "an object of layer patterns and ranks")
    check("alpha_pattern", lambda v: _is_table(v, _is_number), "an object of layer patterns and numbers")
    for key in ("target_modules", "exclude_modules", "layers_pattern"):
        check(key, _are_names, "a list of names, one string or null")
    check(
        "layers_to_transform",
        lambda v: v is None or _is_index(v) or (isinstance(v, list) and all(map(_is_index, v))),
        "a layer's number, a list of them or null",
    )
    if isinstance(config.get("target_modules"), str):
        for key in ("layers_to_transform", "layers_pattern"):
            if config.get(key) is not None:
                raise ValueError(f"{where}: {key} can't be used with a target_modules that is one string; give a list")
    if config.get("layers_pattern") and config.get("layers_to_transform") is None:
        raise ValueError(f"{where}: layers_pattern needs layers_to_transform; add it, or remove layers_pattern")
    _check_patterns(config, where)


def _check_patterns(config: Mapping[str, Any], where: str) -> None:
    """Every regular expression compiles in the form in which it is used."""
    layers = config.get("layers_pattern") or []
    patterns = [(key, rf"(.*\.)?({p})$") for key in ("rank_pattern", "alpha_pattern") for p in config.get(key) or {}]
    patterns += [
        ("layers_pattern", rf"(?:^|.*?\.){p}\.(?P<idx>\d+)\.")
        for p in ([layers] if isinstance(layers, str) else layers)
    ]
    patterns += [
        (key, config[key]) for key in ("target_modules", "exclude_modules") if isinstance(config.get(key), str)
    ]
    for key, pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"{where}: {key} holds {pattern!r}, no regular expression ({error})") from None


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_index(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _are_ids(value: object) -> bool:
    return isinstance(value, list) and all(_is_index(one) and one >= 0 for one in value)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_table(value: object, fits: Callable[[object], bool]) -> bool:
    return value is None or (isinstance(value, dict) and all(map(fits, value.values())))


def _are_names(value: object) -> bool:
    return (
        value is None or isinstance(value, str) or (isinstance(value, list) and all(isinstance(v, str) for v in value))
    )


def rank_and_alpha(config: Mapping[str, Any], path: str) -> tuple[int, float]:
    """A layer's rank and alpha: the first pattern that matches the end of its path from a dot on, else r and lora_alpha."""

    def chosen(patterns: Mapping[str, Any] | None, default: Any) -> Any:
        for pattern, value in (patterns or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", path):
                return value
        return (patterns or {}).get(path, default)

    rank, alpha = config.get("r", 8), config.get("lora_alpha", 8)
    return chosen(config.get("rank_pattern"), rank), chosen(config.get("alpha_pattern"), alpha)


def saved_names(config: Mapping[str, Any]) -> list[str]:
    """The ends of the paths of modules that train in full."""
    return list(config.get("modules_to_save") or [])


def token_ids_of(config: Mapping[str, Any], path: str) -> list[int] | None:
    """Which rows of the embedding or head at this path the adapter has of its own; None for none."""
    ids = config.get("trainable_token_indices")
    if isinstance(ids, dict):
        return next((list(own) for name, own in ids.items() if path.endswith(name)), None)
    return list(ids) if ids and path.endswith("embed_tokens") else None


def is_target(config: Mapping[str, Any], path: str) -> bool:
    """Whether PEFT gives the linear at this path an adapter (its check_target_module_exists, 0.21)."""
    excluded = config.get("exclude_modules")
    if excluded and (
        re.fullmatch(excluded, path)
        if isinstance(excluded, str)
        else path in excluded or any(path.endswith(f".{name}") for name in excluded)
    ):
        return False
    targets = config.get("target_modules")
    targets = DEFAULT_TARGETS if targets is None else targets
    if isinstance(targets, str):
        if targets.lower() == ALL_LINEAR:
            return path != "lm_head"
        return re.fullmatch(targets, path) is not None
    if path in targets:
        return True
    if not any(path.endswith(f".{name}") for name in targets):
        return False
    indices, layers = config.get("layers_to_transform"), config.get("layers_pattern") or []
    if indices is None or indices == []:
        return True
    if not layers:
        found = re.match(r".*?\.[^.]*\.(?P<idx>\d+)\.", path)
    else:
        tried = (
            re.match(rf"(?:^|.*?\.){p}\.(?P<idx>\d+)\.", path)
            for p in ([layers] if isinstance(layers, str) else layers)
        )
        found = next((match for match in tried if match), None)
    return found is not None and int(found["idx"]) in ([indices] if isinstance(indices, int) else indices)
