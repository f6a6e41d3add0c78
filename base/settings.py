"""Fill frozen dataclasses from TOML and `key=value`, with errors that name the nearest known key."""

import dataclasses
import difflib
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file as flat keys; tables such as [model] and [train] only group them. Raises ValueError naming the line."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"config {path} is a folder; a TOML file is due")
    if not path.exists():
        raise FileNotFoundError(f"config {path} does not exist")
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"config {path}: not TOML: {error}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"config {path}: not UTF-8 at byte {error.start}") from None
    flat: dict[str, Any] = {}
    for key, value in found.items():
        flat |= value if isinstance(value, dict) else {key: value}
    return flat


def parse_assignments(assignments: Sequence[str]) -> dict[str, Any]:
    """['d_model=64', 'dtype=bfloat16'] -> {'d_model': 64, 'dtype': 'bfloat16'}; values are TOML, bare words strings."""
    parsed = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key.strip():
            raise ValueError(f"setting {assignment!r} is not key=value; write for example d_model=256")
        try:
            parsed[key.strip()] = tomllib.loads(f"x = {text.strip()}")["x"]
        except tomllib.TOMLDecodeError:
            parsed[key.strip()] = text.strip()
    return parsed


def known_keys(*kinds: type) -> dict[str, Any]:
    """Field name -> type for all the dataclasses."""
    return {name: hint for kind in kinds for name, hint in typing.get_type_hints(kind).items()}


def check_settings(settings: Mapping[str, Any], *kinds: type) -> dict[str, Any]:
    """The settings with numbers in their field's type. Raises ValueError for unknown keys or values of the wrong type."""
    fields = known_keys(*kinds)
    checked = {}
    for key, value in settings.items():
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(fields))}"
            raise ValueError(f"unknown config key {key!r}; {hint}")
        checked[key] = _as_type(key, value, fields[key])
    return checked


def _as_type(key: str, value: Any, hint: Any) -> Any:
    """Accept a whole number for a float; nothing else is converted."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value in ("none", "None") and type(None) in options:
        return None
    for option in options:
        if typing.get_origin(option) is tuple and isinstance(value, list):
            return tuple(value)
        if option is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if isinstance(option, type) and isinstance(value, option) and (option is bool or not isinstance(value, bool)):
            return value
        if dataclasses.is_dataclass(option) and isinstance(option, type) and isinstance(value, dict):
            return option(**check_settings(value, option))
    names = " or ".join(getattr(option, "__name__", str(option)) for option in options)
    raise ValueError(f"config key {key} = {value!r} is {type(value).__name__}; {names} is due")


def split_settings(settings: Mapping[str, Any], *kinds: type) -> list[dict[str, Any]]:
    """One dict for each dataclass. A key that several of them have goes to each."""
    return [{key: value for key, value in settings.items() if key in typing.get_type_hints(kind)} for kind in kinds]
