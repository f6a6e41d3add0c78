"""Tokens as one sees them: coloured text, and a table of ids."""

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

COLOURS = ("#a6cee3", "#b2df8a", "#fdbf6f", "#cab2d6", "#fb9a99")


def spell(token: bytes) -> str:
    """A token's text; bytes that aren't whole characters as <c3>, white space and controls made visible."""
    try:
        text = token.decode()
    except UnicodeDecodeError:
        return "".join(chr(byte) if 32 < byte < 127 else f"<{byte:02x}>" for byte in token)
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def colour_tokens(tokens: Sequence[bytes], *, marks: bool = False) -> Text:
    """The tokens in a row, each on another colour than its neighbours; a line break is shown and kept.

    `marks` puts a bar between neighbours, for where there are too few colours.
    """
    out = Text()
    for place, token in enumerate(tokens):
        if marks and place:
            out.append("|", style="dim")
        out.append(spell(token), style=f"black on {COLOURS[place % len(COLOURS)]}")
        out.append("\n" * token.count(b"\n"))
    return out


def token_table(ids: Sequence[int], tokens: Sequence[bytes]) -> Table:
    """Each token with its id and its bytes."""
    table = Table("token", "id", "bytes")
    for index, token in zip(ids, tokens, strict=True):
        table.add_row(Text(repr(spell(token))), str(index), token.hex(" "))
    return table
