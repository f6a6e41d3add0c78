"""Fill frozen dataclasses from TOML, `key=value` and keyword arguments; describe them from their own comments.

A field's type, default and the comment on its line are the one source for the parser, for messages and for `graft config`.
"""

import ast
import dataclasses
import difflib
import inspect
import io
import textwrap
import tokenize
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

# Flags whose names are shorter than their key's: a TOML file, --set and Python take both.
SHORT_NAMES = {"lr": "learning_rate", "warmup": "warmup_steps", "save_every": "checkpoint_every"}
TABLES = (
    "model",
    "train",
    "pretrain",
    "data",
    "records",
    "lora",
    "quant",
    "objective",
)  # of a TOML file: they only group keys

# What other libraries call our fields (transformers, PEFT, TRL, axolotl, Unsloth, nanoGPT), for messages.
# Where one name can mean several fields, the first that the command has is meant.
USUAL_NAMES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("lr", "max_lr", "learning_rate_max", "peak_lr"), ("learning_rate",)),
    **dict.fromkeys(("epochs", "num_epochs", "num_train_epochs", "n_epochs"), ("epochs", "steps")),
    **dict.fromkeys(("max_steps", "max_iters", "num_steps", "n_steps", "iters", "iterations"), ("steps",)),
    **dict.fromkeys(
        ("max_length", "max_seq_length", "seq_len", "sequence_len", "cutoff_len", "block_size", "context_length"),
        ("max_seq_len",),
    ),
    "max_position_embeddings": ("max_seq_len",),
    **dict.fromkeys(("lora_r", "r", "lora_rank"), ("rank",)),
    "lora_alpha": ("alpha",),
    "lora_dropout": ("dropout",),
    **dict.fromkeys(("target_modules", "lora_target_modules", "lora_target"), ("targets",)),
    **dict.fromkeys(("use_rslora", "rslora"), ("rank_stabilized",)),
    **dict.fromkeys(("dora", "lora_use_dora"), ("use_dora",)),
    **dict.fromkeys(("loraplus_lr_ratio", "loraplus_ratio"), ("lora_plus_ratio",)),
    "init_lora_weights": ("init",),
    "num_virtual_tokens": ("prefix_tokens",),
    **dict.fromkeys(("per_device_train_batch_size", "micro_batch_size", "device_batch_size"), ("micro_batch",)),
    **dict.fromkeys(("gradient_accumulation_steps", "grad_accum"), ("micro_batch",)),
    **dict.fromkeys(("global_batch_size", "total_batch_size", "bs"), ("batch_size",)),
    **dict.fromkeys(("warmup", "num_warmup_steps", "warmup_iters", "warmup_ratio"), ("warmup_steps",)),
    **dict.fromkeys(("lr_scheduler", "lr_scheduler_type", "scheduler"), ("schedule",)),
    **dict.fromkeys(("min_lr", "min_lr_ratio", "final_lr"), ("final_lr_fraction",)),
    **dict.fromkeys(("max_grad_norm", "gradient_clipping", "clip_grad", "grad_clip_norm"), ("grad_clip",)),
    **dict.fromkeys(("wd", "decay"), ("weight_decay",)),
    **dict.fromkeys(("optim", "optimizer_name"), ("optimizer",)),
    **dict.fromkeys(("adam_beta1", "b1"), ("beta1",)),
    **dict.fromkeys(("adam_beta2", "b2"), ("beta2",)),
    **dict.fromkeys(("adam_epsilon", "epsilon"), ("eps",)),
    **dict.fromkeys(("bf16", "fp16", "precision", "torch_dtype", "mixed_precision"), ("dtype",)),
    **dict.fromkeys(("gradient_checkpointing", "activation_checkpointing"), ("checkpointing",)),
    **dict.fromkeys(("save_steps", "save_every", "save_interval"), ("checkpoint_every",)),
    **dict.fromkeys(("eval_steps", "eval_interval", "evaluation_interval"), ("eval_every",)),
    **dict.fromkeys(("eval_iters",), ("eval_batches",)),
    **dict.fromkeys(("early_stopping_patience", "early_stopping"), ("patience",)),
    **dict.fromkeys(("save_total_limit", "load_best_model_at_end"), ("keep",)),
    **dict.fromkeys(("random_seed", "data_seed"), ("seed",)),
    **dict.fromkeys(("sample_packing", "pack"), ("packing",)),
    **dict.fromkeys(("bnb_4bit_use_double_quant", "use_double_quant"), ("double_quant",)),
    **dict.fromkeys(("hidden_size", "n_embd", "dim", "d"), ("d_model",)),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "depth"), ("n_layers",)),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads"), ("n_heads",)),
    **dict.fromkeys(("num_key_value_heads", "n_kv_head"), ("n_kv_heads",)),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "hidden_dim"), ("d_ff",)),
    "head_dim": ("d_head",),
    "tie_word_embeddings": ("tie_embeddings",),
    "initializer_range": ("init_std",),
    "rms_norm_eps": ("norm_eps",),
}


def plain(value: Any) -> Any:
    """Dataclasses, paths and tuples as JSON knows them."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


# --- reading -------------------------------------------------------------------------------------------------------


def read_toml(path: Path | str) -> dict[str, Any]:
    """A TOML file as flat keys; tables such as [model] and [train] only group them.

    Raises ValueError naming the line, or the key that stands in two places; OSError for what is no regular file.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"config {path} is a folder; expected a TOML file")
    if not path.exists():
        raise FileNotFoundError(f"config {path} does not exist")
    if not path.is_file():
        raise ValueError(f"config {path} is not a regular file; expected a TOML file")
    try:
        raw_config = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"config {path}: not TOML: {error}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"config {path}: not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise ValueError(f"config {path}: nested too deeply") from None
    return flattened(raw_config, where=f"config {path}")


def flattened(tables: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """A parsed TOML file as flat keys. Raises ValueError for a key that stands in two places."""
    flat: dict[str, Any] = {}
    home: dict[str, str] = {}
    for name, value in tables.items():
        is_table = name in TABLES and isinstance(value, dict)
        here = f"[{name}]" if is_table else "the top level"
        for key, setting in (value if is_table else {name: value}).items():
            key = SHORT_NAMES.get(key, key)
            if key in flat:
                raise ValueError(f"{where}: {key} stands in {home[key]} and in {here}; keep one of them")
            flat[key], home[key] = setting, here
    return flat


def parse_assignments(assignments: Sequence[str]) -> dict[str, Any]:
    """['d_model=64', 'dtype=bfloat16'] -> {'d_model': 64, 'dtype': 'bfloat16'}; values are TOML, bare words strings.

    Raises ValueError for what is not key=value, and for a key that is given twice.
    """
    parsed: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = (part.strip() for part in assignment.partition("="))
        if not equals or not key:
            raise ValueError(f"setting {assignment!r} is not key=value; write for example d_model=256")
        key = SHORT_NAMES.get(key, key)
        if key in parsed:
            raise ValueError(f"--set {key} is given twice; keep one of them")
        try:
            parsed[key] = tomllib.loads(f"x = {text}")["x"]
        except (tomllib.TOMLDecodeError, RecursionError):
            parsed[key] = text
    return parsed


def combine(config: Path | None, assignments: Sequence[str], flags: Mapping[str, object]) -> dict[str, Any]:
    """A TOML file's keys, overridden by --set and by the flags that were given (those that are not None).

    Raises ValueError when a flag and --set give one key two values.
    """
    settings = read_toml(config) if config else {}
    assigned = parse_assignments(assignments)
    given = {key: value for key, value in flags.items() if value is not None}
    for key in assigned.keys() & given.keys():
        if assigned[key] != given[key]:
            flag = "--" + key.replace("_", "-")
            raise ValueError(f"{flag} {given[key]} and --set {key}={assigned[key]} contradict each other; give one")
    return settings | assigned | given


# --- checking ------------------------------------------------------------------------------------------------------


def check_settings(settings: Mapping[str, Any], *kinds: type) -> dict[str, Any]:
    """The settings with values in their field's type. Raises ValueError for unknown keys or values of the wrong type."""
    fields = {name: hint for kind in kinds for name, hint in typing.get_type_hints(kind).items()}
    checked = {}
    for given, value in settings.items():
        key = given if given in fields else SHORT_NAMES.get(given, given)
        if key in checked:
            raise ValueError(f"{key} is given twice, once by its short name; keep one of them")
        if key not in fields:
            raise ValueError(f"unknown config key {key!r}; {_hint(key, list(fields))}")
        checked[key] = _as_type(key, value, fields[key])
    return checked


def _hint(key: str, known: Sequence[str]) -> str:
    """What an unknown key may have meant: its name in other libraries, or the nearest known one."""
    usual = USUAL_NAMES.get(key.lower().replace("-", "_"), ())
    near = [name for name in usual if name in known] or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(known))}"


def _as_type(key: str, value: Any, hint: Any) -> Any:
    """Accept a whole number for a float, a list or comma-separated words for a tuple, a table for a dataclass."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    if value in ("none", "None") and type(None) in options:
        return None
    for option in options:
        if typing.get_origin(option) is tuple:
            inner = typing.get_args(option)[0]
            items = [word.strip() for word in value.split(",") if word.strip()] if isinstance(value, str) else value
            if inner is bool and isinstance(items, list):
                items = [{"true": True, "false": False}.get(word, word) for word in items]
            if isinstance(items, list | tuple) and all(_is_a(item, inner) for item in items):
                return tuple(items)
        if option is float and isinstance(value, int) and not isinstance(value, bool):
            try:
                return float(value)
            except OverflowError:
                raise ValueError(f"config key {key} = {str(value)[:12]}... is too large for a float") from None
        if _is_a(value, option):
            return value
        if dataclasses.is_dataclass(option) and isinstance(option, type) and isinstance(value, dict):
            return option(**check_settings(value, option))
    names = " or ".join(type_name(option) for option in options)
    raise ValueError(f"config key {key} = {value!r} is {type(value).__name__}; expected {names}")


def _is_a(value: Any, kind: Any) -> bool:
    if typing.get_origin(kind) is typing.Literal:  # the dataclass itself lists its choices for another word
        return isinstance(value, str)
    return isinstance(kind, type) and isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def split_settings(settings: Mapping[str, Any], *kinds: type) -> list[dict[str, Any]]:
    """One dict for each dataclass. A key that several of them have goes to each."""
    return [{key: value for key, value in settings.items() if key in typing.get_type_hints(kind)} for kind in kinds]


# --- describing ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Key:
    """One key of a config, for `graft config`."""

    name: str
    type: str
    default: str
    meaning: str


def type_name(hint: Any) -> str:
    """A type as a reader writes it: int, float or None, list of str."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return " or ".join(type_name(option) for option in typing.get_args(hint))
    if hint is type(None):
        return "none"
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(map(str, typing.get_args(hint)))
    if typing.get_origin(hint) is tuple:
        return f"list of {type_name(typing.get_args(hint)[0])}"
    if dataclasses.is_dataclass(hint):
        return "table"
    return getattr(hint, "__name__", str(hint))


def describe(kind: type) -> list[Key]:
    """The keys of a config dataclass: name, type, default, and the comment on the field's line in its source file."""
    hints, comments = typing.get_type_hints(kind), field_comments(kind)
    keys = []
    for field in dataclasses.fields(kind):
        has_default = field.default is not dataclasses.MISSING
        default = plain(field.default) if has_default else "required"
        if isinstance(default, list):
            default = ",".join(map(str, default))
        if isinstance(default, dict):
            default = ", ".join(f"{name}={value}" for name, value in default.items())
        if default is None or isinstance(default, bool):
            default = str(default).lower()
        keys.append(Key(field.name, type_name(hints[field.name]), str(default), comments.get(field.name, "")))
    return keys


@cache
def field_comments(kind: type) -> dict[str, str]:
    """Field name -> the comment on its own lines, or above it, read from the class's source file."""
    source = textwrap.dedent(inspect.getsource(kind))
    [body] = ast.parse(source).body
    assert isinstance(body, ast.ClassDef)
    text = source.splitlines()
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    found = {}
    for node in body.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            lines = [line for line in range(node.lineno, (node.end_lineno or node.lineno) + 1) if line in comments]
            above = node.lineno - 1
            while not lines and above in comments and text[above - 1].lstrip().startswith("#"):
                above -= 1
            lines = lines or range(above + 1, node.lineno)
            found[node.target.id] = " ".join(comments[line] for line in lines)
    return found
