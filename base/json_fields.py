"""JSON that comes from a file, checked where it is read: a missing key or a wrong type is one line that names file and key."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Kind = type | tuple[type, ...]
_NAMES = {
    dict: "an object",
    list: "a list",
    str: "a string",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}
_REQUIRED: Any = object()


def read_json(path: Path | str, expected: Mapping[str, Kind] | None = None) -> dict[str, Any]:
    """Read a file that holds a JSON object. The keys of `expected` must be there, each with a value of its kind.

    Raises FileNotFoundError, IsADirectoryError, or ValueError that names the file and the line and column, or the key.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; expected a JSON file")
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if not path.is_file():
        raise ValueError(f"{path} is not a regular file; expected a JSON file")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} line {error.lineno}: not JSON ({error.msg} at column {error.colno})") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}; write it again as UTF-8") from None
    except RecursionError:
        raise ValueError(f"{path}: nested too deeply") from None
    except ValueError as error:  # a number of more than 4,300 digits
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {kind_of(value)}; expected an object")
    check_fields(value, expected or {}, path)
    return value


def check_fields(section: Mapping[str, Any], expected: Mapping[str, Kind], where: object) -> None:
    """Raise ValueError, naming `where` and the key, unless each expected key is there with a value of its kind."""
    for key, kind in expected.items():
        if key not in section:
            raise ValueError(f"{where}: {key} is missing; the file is damaged")
        check(section[key], kind, f"{where}: {key}")


def field(
    section: Mapping[str, Any],
    key: str,
    kind: Kind,
    where: object,  # the file, for the message
    *,
    default: Any = _REQUIRED,  # for an absent key, and for null
) -> Any:
    """section[key], checked to be of the kind.

    Raises ValueError naming the file and the key when the key is absent without a default, or has another kind.
    """
    value = section.get(key)
    if value is None:
        if default is _REQUIRED:
            raise ValueError(f"{where}: {key} is missing; the file is incomplete")
        return default
    return check(value, kind, f"{where}: {key}")


def check(value: Any, kind: Kind, name: str) -> Any:
    """The value, checked to be of the kind. A whole number passes for a float; true and false are no numbers.

    Raises ValueError that begins with the name.
    """
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if type(value) in kinds or (float in kinds and type(value) is int):
        return value
    names = " or ".join(_NAMES.get(one, one.__name__) for one in kinds)
    raise ValueError(f"{name} is {kind_of(value)}; expected {names}")


def kind_of(value: Any) -> str:
    """A JSON value's kind and, where it is short, the value itself."""
    if value is None:
        return "null"
    name = _NAMES.get(type(value), type(value).__name__)
    if isinstance(value, int) and value.bit_length() > 128:  # repr() refuses more than 4,300 digits
        return name
    shown = repr(value)
    return f"{name} ({shown})" if len(shown) <= 40 else name
