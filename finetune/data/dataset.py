"""Records -> encoded rows, with nothing lost in silence: what was cut, split, dropped or empty is counted and said."""

from collections import Counter
from collections.abc import Callable, Iterable, Sized
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from ...base.tokenizer.tokenizer import Tokenizer
from .chat import ChatTemplate, Encoded, SpecialTokens, encode_whole, n_spelled_specials, unwritten
from .record import Record
from .records import Faults
from .row_store import RowStore

OnTooLong = Literal["auto", "cut", "drop", "split", "error"]
OnEmpty = Literal["drop", "error"]


@dataclass(frozen=True)
class DatasetOptions:
    """What to do with rows that can't be used as they are. Raises ValueError for an unknown choice."""

    # auto: texts become windows, answers are cut, and a prompt that leaves no room for an answer is an error
    # cut: what is beyond the limit goes; drop: the row goes; split: windows, each label once; error: all are listed
    on_too_long: OnTooLong = "auto"
    on_empty: OnEmpty = "error"  # rows with a null or empty answer or text
    special_tokens: SpecialTokens = "text"  # what a special token that the data spells is: plain text, or the token

    def __post_init__(self) -> None:
        choices = {"on_too_long": OnTooLong, "on_empty": OnEmpty, "special_tokens": SpecialTokens}
        for name, known in choices.items():
            if getattr(self, name) not in get_args(known):
                flag = f"--{name.replace('_', '-')}"
                raise ValueError(f"{flag} {getattr(self, name)!r} is unknown; choose {', '.join(get_args(known))}")


@dataclass(frozen=True)
class DatasetReport:
    """What became of the records. Counts are of records, but for the last four."""

    n_records: int = 0
    n_cut: int = 0  # lost their end
    n_dropped: int = 0  # too long, left out
    n_split: int = 0  # became several windows
    n_empty: int = 0  # null or empty, left out
    n_special: int = 0  # spell a control token
    n_reasoning_unwritten: int = 0  # the template leaves out a learned turn's reasoning
    n_tools_unwritten: int = 0  # the template leaves out the tools
    n_lost_labels: int = 0  # tokens that were cut off and would have been learned
    n_rows: int = 0  # encoded rows; windows count each
    n_tokens: int = 0  # in the rows, the prompts' included
    n_labels: int = 0  # tokens that carry loss
    sources: tuple[int, ...] = ()  # for each row, the index of its record

    def figures(self) -> dict[str, int]:
        """The counts, for run.json and the summary."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "sources"}

    def lines(self, limit: int, options: DatasetOptions) -> list[str]:
        """What a user should know, a sentence each; empty when every record went in as it is."""
        said = []
        if self.n_cut:
            said.append(
                f"{self.n_cut:,} of {self.n_records:,} records are longer than {limit:,} tokens and were cut; "
                f"{self.n_lost_labels:,} tokens that would be learned are lost (--on-too-long drop, split or error)"
            )
        if self.n_split:
            said.append(f"{self.n_split:,} records are longer than {limit:,} tokens and became windows")
        if self.n_dropped:
            said.append(
                f"{self.n_dropped:,} of {self.n_records:,} records are longer than {limit:,} tokens and were dropped"
            )
        if self.n_empty:
            said.append(f"{self.n_empty:,} of {self.n_records:,} records are null or empty and were dropped")
        if self.n_special:
            how = "plain text" if options.special_tokens == "text" else "the tokens themselves"
            other = "tokens" if options.special_tokens == "text" else "text"
            said.append(
                f"{self.n_special:,} records spell special tokens, taken as {how} (--special-tokens {other} for the other)"
            )
        for what, n in (("reasoning", self.n_reasoning_unwritten), ("tools", self.n_tools_unwritten)):
            if n:
                said.append(
                    f"{n:,} of {self.n_records:,} records have {what} that the chat template doesn't write "
                    "(another --chat-template may)"
                )
        return said


def encode_dataset(
    records: Iterable[Record],
    tokenizer: Tokenizer,
    template: ChatTemplate | None,  # None: ChatTemplate.of(tokenizer)
    limit: int,  # tokens a row may have: the model's positions and one, since the last token is only a target
    options: DatasetOptions | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,  # called with (done, total); total is 0 where it isn't known
) -> tuple[list[Encoded], DatasetReport]:
    """All records as rows of at most `limit` tokens, and what became of them.

    Windows overlap by the one token that they start from, so each label is learned once. Raises ValueError that names
    every bad row (the first few, and a count): rows without an answer, rows that the template refuses, empty rows and
    rows that are too long where the options say so; and when no row is left.
    """
    encoder = _Encoder(tokenizer, template or ChatTemplate.of(tokenizer), limit, options or DatasetOptions())
    rows: list[Encoded] = []
    sources: list[int] = []
    total = len(records) if isinstance(records, Sized) else 0
    for i, record in enumerate(records):
        if progress is not None:
            progress(i, total)
        pieces = encoder.rows_of(record)
        rows += pieces
        sources += [i] * len(pieces)
    return rows, replace(encoder.report(), sources=tuple(sources))


def encode_to_disk(
    records: Iterable[Record],
    tokenizer: Tokenizer,
    template: ChatTemplate,
    limit: int,
    options: DatasetOptions,
    *,
    folder: Path | str,  # where the rows' file lies
) -> tuple[RowStore, DatasetReport]:
    """`encode_dataset` with one record in memory at a time: the same rows in the same order, from a file.

    Raises as `encode_dataset`, and OSError when the disk is full.
    """
    encoder = _Encoder(tokenizer, template, limit, options)
    rows = RowStore(folder)
    try:
        for record in records:
            for row in encoder.rows_of(record):
                rows.append(row)
        report = encoder.report()
        rows.finish()
    except BaseException:
        rows.close()
        raise
    return rows, report


class _Encoder:
    """Encodes one record after the other, and counts what becomes of them."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate, limit: int, options: DatasetOptions) -> None:
        if limit < 2:
            raise ValueError(f"limit={limit} tokens a row must be >= 2: one to read and one to predict")
        self.tokenizer, self.template, self.limit, self.options = tokenizer, template, limit, options
        self._counts = Counter[str]()
        self._faults = Faults()

    def rows_of(self, record: Record) -> list[Encoded]:
        """The record's rows; none when it is dropped, or bad, of which `report` tells."""
        counts, options = self._counts, self.options
        counts["n_records"] += 1
        if record.empty is not None and options.on_empty == "drop":
            counts["n_empty"] += 1
            return []
        try:
            whole = encode_whole(record, self.tokenizer, self.template, special_tokens=options.special_tokens)
            pieces = _fit(whole, record, self.limit, options, counts)
        except ValueError as error:
            hint = " (--on-empty drop leaves such rows out)" if record.empty is not None else ""
            self._faults.add(f"{error}{hint}")
            return []
        counts["n_special"] += n_spelled_specials(record, self.tokenizer) > 0
        for name in unwritten(record, self.template):
            counts[f"n_{name}_unwritten"] += 1
        counts["n_rows"] += len(pieces)
        counts["n_tokens"] += sum(len(row.ids) for row in pieces)
        counts["n_labels"] += sum(int(row.loss_mask[1:].sum()) for row in pieces)
        return pieces

    def report(self) -> DatasetReport:
        """What became of the records. Raises ValueError that names the bad ones, and when no row is left."""
        self._faults.raise_if_any()
        counts = self._counts
        if not counts["n_rows"]:
            raise ValueError(
                f"none of the {counts['n_records']:,} records is left to learn from ({counts['n_empty']:,} empty, "
                f"{counts['n_dropped']:,} longer than {self.limit:,} tokens); raise max_seq_len, or check the data"
            )
        return replace(DatasetReport(), **counts)


def _fit(whole: Encoded, record: Record, limit: int, options: DatasetOptions, counts: Counter[str]) -> list[Encoded]:
    """The record's rows: itself, its windows, its beginning, or none."""
    n = len(whole.ids)
    if not whole.loss_mask[1:].any():
        raise ValueError(f"{record.where}: no token of it carries loss; give it an answer, or drop the row")
    if n <= limit:
        return [whole]
    how = options.on_too_long
    if how == "auto":
        how = "split" if record.text is not None else "cut"
    if how == "drop":
        counts["n_dropped"] += 1
        return []
    if how == "split":
        counts["n_split"] += 1
        return windows(whole, limit)
    if how == "error":
        raise ValueError(
            f"{record.where}: {n:,} tokens where max_seq_len={limit}; raise it, or choose --on-too-long cut, drop or split"
        )
    kept = whole.loss_mask[1:limit].any()
    if not kept:
        n_prompt = int(whole.loss_mask[1:].argmax()) + 1
        raise ValueError(
            f"{record.where}: no label is left after truncation to max_seq_len={limit}, as the prompt alone has "
            f"{n_prompt} tokens; raise max_seq_len to {n} if the base reads so many, or leave such rows out with --on-too-long drop"
        )
    counts["n_cut"] += 1
    counts["n_lost_labels"] += int(whole.loss_mask[limit:].sum())
    return [Encoded(whole.ids[:limit], whole.loss_mask[:limit])]


def windows(whole: Encoded, limit: int) -> list[Encoded]:
    """Pieces of at most `limit` tokens that overlap by one token; those without a label are left out.

    Five tokens a b c d e, limit 3: a b c, then c d e. The first token of a piece is never a label there: it was the last
    label of the piece before.
    """
    pieces = [
        Encoded(whole.ids[start : start + limit], whole.loss_mask[start : start + limit])
        for start in range(0, len(whole.ids) - 1, limit - 1)
    ]
    return [piece for piece in pieces if np.any(piece.loss_mask[1:])]


def options_from(settings: dict[str, Any]) -> tuple[DatasetOptions, dict[str, Any]]:
    """DatasetOptions from a mapping, and the keys that are left."""
    names = asdict(DatasetOptions()).keys()
    own = {key: value for key, value in settings.items() if key in names}
    return DatasetOptions(**own), {key: value for key, value in settings.items() if key not in names}
