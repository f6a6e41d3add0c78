"""UTF-8: bytes of a str, also of one that holds half a surrogate pair (JSON's "\\ud800"), and bytes that must be valid."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

Errors = Literal["strict", "replace"]


def to_utf8(text: str) -> bytes:
    """The text's UTF-8 bytes. Two surrogates that make a character become it; a lone one becomes U+FFFD."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace").encode()


def checked(
    data: bytes,
    file: Path | str,
    offset: int,
    errors: Errors,
    on_replaced: Callable[[], None] | None = None,  # called when bytes were replaced
) -> bytes:
    """The bytes, which lie at `offset` of the file, as valid UTF-8. Raises ValueError with the offset of one that isn't."""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        if errors == "replace":
            if on_replaced is not None:
                on_replaced()
            return data.decode("utf-8", "replace").encode()
        at = offset + error.start
        raise ValueError(
            f"{file} is not UTF-8: byte 0x{data[error.start]:02x} at byte offset {at}; fix the file or pass "
            "--errors replace to put U+FFFD there"
        ) from None
    return data
