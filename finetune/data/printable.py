"""Text from outside, made harmless for a terminal."""

import unicodedata

_JOINERS = "\u200c\u200d"  # inside emoji and Persian words


def printable(text: str) -> str:
    r"""Control characters (ESC, C1, bidirectional marks) other than line breaks and tabs as their escapes: \x1b, \u202e."""
    return "".join(c if _is_safe(c) else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def _is_safe(c: str) -> bool:
    return c.isprintable() or c in "\n\t" or c in _JOINERS or unicodedata.category(c) == "Zs"
