"""Text that comes from files or from a user, made safe to print: control characters would act on the terminal, and rich reads
square brackets as markup."""

import unicodedata

_JOINERS = "\u200c\u200d"


def printable(text: object, *, keep: str = "") -> str:
    r"""str(text) with each character that is not printable written as its escape (ESC is `\x1b`), but those in `keep`.

    Covers C0 and C1 controls, half surrogates and the marks that change the direction of writing; the joiners inside emoji
    and Persian words and spaces of other widths are left alone.
    """
    return "".join(c if _is_safe(c) or c in keep else c.encode("unicode_escape").decode() for c in str(text))


def _is_safe(c: str) -> bool:
    return c.isprintable() or c in _JOINERS or unicodedata.category(c) == "Zs"


def markup(text: object) -> str:
    """`printable` text, escaped for a place where rich reads markup."""
    from rich.markup import escape

    return escape(printable(text))
