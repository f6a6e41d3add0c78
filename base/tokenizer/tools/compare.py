"""Five ways to cut the same text: characters, bytes, words, graft's BPE and GPT-2's."""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import regex
from rich.table import Table

from ..tokenizer import Tokenizer

WORDS = r"\w+|[^\w\s]"
DEFAULT_SIZE = 5_000  # of the vocabulary that is trained here; halved until a short text can fill it
TRAINED_SHARE = 0.9  # of the text; the figures are about the rest


@dataclass(frozen=True)
class Row:
    """What one way of cutting makes of a text."""

    name: str
    vocab_size: int
    n_tokens: int
    n_unknown: int  # tokens that the vocabulary doesn't have


def compare_ways(text: str, tokenizer: Path | None, vocab_size: int | None, gpt2: Path | None) -> tuple[list[Row], int]:
    """The rows, and the bytes of the text that they are about. Raises ValueError for a text of less than 10 characters."""
    cut = int(len(text) * TRAINED_SHARE)
    seen, rest = text[:cut], text[cut:]
    if len(rest) < 1 or len(seen) < 9:
        raise ValueError(f"the files hold {len(text)} characters; give at least 10 to compare on")
    characters = set(seen)
    words = set(regex.findall(WORDS, seen))
    found = regex.findall(WORDS, rest)
    rows = [
        Row("characters", len(characters), len(rest), sum(character not in characters for character in rest)),
        Row("bytes", 256, len(rest.encode()), 0),
        Row("words", len(words), len(found), sum(word not in words for word in found)),
    ]
    own = Tokenizer.load(tokenizer) if tokenizer is not None else _train(seen, vocab_size)
    rows.append(Row("graft BPE", own.vocab_size, len(own.encode(rest)), 0))
    if gpt2 is not None:
        tok = Tokenizer.load(gpt2)
        rows.append(Row("GPT-2 BPE", tok.vocab_size, len(tok.encode(rest)), 0))
    return rows, len(rest.encode())


def _train(text: str, vocab_size: int | None) -> Tokenizer:
    with TemporaryDirectory() as folder:
        file = Path(folder) / "text.txt"
        file.write_text(text, encoding="utf-8", newline="")
        if vocab_size is not None:
            return Tokenizer.train([file], vocab_size=vocab_size, special_tokens=[])
        size = DEFAULT_SIZE
        while True:
            try:
                return Tokenizer.train([file], vocab_size=size, special_tokens=[])
            except ValueError:  # more than a short text can fill
                if size <= 256:
                    raise
                size = max(256, size // 2)


def comparison_table(text: str, tokenizer: Path | None, vocab_size: int | None, gpt2: Path | None) -> Table:
    """The rows as a table."""
    rows, n_bytes = compare_ways(text, tokenizer, vocab_size, gpt2)
    table = Table(title=f"The last {n_bytes:,} bytes of the text")
    table.add_column("cut into")
    for heading in ("vocabulary", "tokens", "bytes a token", "unknown"):
        table.add_column(heading, justify="right")
    for row in rows:
        unknown = f"{row.n_unknown:,} ({row.n_unknown / max(1, row.n_tokens):.1%})"
        ratio = f"{n_bytes / max(1, row.n_tokens):.2f}"
        table.add_row(row.name, f"{row.vocab_size:,}", f"{row.n_tokens:,}", ratio, unknown)
    if gpt2 is None:
        table.caption = "GPT-2's row needs its files: --gpt2 FOLDER"
    return table
