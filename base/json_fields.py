"""The structure of JSON that comes from a file: checked where it is read, so that a wrong type is one line that names it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
_NAMES = {
    dict: "an object",
    list: "a list",
    str: "a string",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
}
_REQUIRED: Any = object()


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object. Raises FileNotFoundError, or ValueError naming the file, the line and what is wrong."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not a regular file; give a file with a JSON object")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte offset {error.start}); write it again as UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON (line {error.lineno}, column {error.colno}: {error.msg})") from None
    except RecursionError:
        raise ValueError(f"{path} nests its brackets too deeply to be a file of this kind") from None
    except ValueError as error:  # a whole number of more than 4,300 digits
        raise ValueError(f"{path} is not JSON that can be read: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {kind_of(value)}; an object is expected")
    return value


def field(
    section: Mapping[str, Any],
    key: str,
    kind: type[T] | tuple[type, ...],
    where: object,  # the file, for the message
    *,
    default: Any = _REQUIRED,  # for an absent key, and for null
) -> Any:
    """section[key], checked to be of the kind. A whole number passes for a float; true and false are no numbers.

    Raises ValueError naming the file and the key when the key is absent without a default, or has another kind.
    """
    value = section.get(key)
    if value is None:
        if default is _REQUIRED:
            raise ValueError(f"{where}: {key} is missing; the file is incomplete")
        return default
    return check(value, kind, f"{where}: {key}")


def check(value: Any, kind: type | tuple[type, ...], name: str) -> Any:
    """The value, checked to be of the kind. Raises ValueError that begins with the name."""
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if type(value) in kinds or (float in kinds and type(value) is int):
        return value
    expected = " or ".join(_NAMES.get(one, one.__name__) for one in kinds)
    raise ValueError(f"{name} is {kind_of(value)}; {expected} is expected")


def kind_of(value: Any) -> str:
    """A JSON value's kind and, where it is short, the value itself."""
    if value is None:
        return "null"
    shown = repr(value)
    name = _NAMES.get(type(value), type(value).__name__)
    return f"{name} ({shown})" if len(shown) <= 40 else name
