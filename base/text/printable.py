"""Text that comes from files or from a user, made safe to print: control characters would act on the terminal, and rich reads
square brackets as markup."""


def printable(text: object, *, keep: str = "") -> str:
    r"""str(text) with each character that is not printable written as its escape (ESC is `\x1b`), but those in `keep`.

    Covers C0 and C1 controls, half surrogates and the marks that change the direction of writing.
    """
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in str(text))


def markup(text: object) -> str:
    """`printable` text, escaped for a place where rich reads markup."""
    from rich.markup import escape

    return escape(printable(text))
