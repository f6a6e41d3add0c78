"""`graft data inspect`: rows as the model will see them, and what a file of records holds."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from ...base.hub import model_folder
from ...base.model.huggingface import load_config
from ...base.text.printable import printable
from ...base.tokenizer.tokenizer import Tokenizer
from .chat import ChatTemplate, Encoded, encode_whole
from .dataset import DatasetOptions, DatasetReport, encode_dataset
from .records import Record, read_all
from .templates import template_source
from .traits import Traits

LEARNED, READ, SPECIAL = "bold green", "dim", "reverse"
_BAR = 40  # characters of the histogram's longest bar


@dataclass(frozen=True)
class Inspection:
    """What `inspect_data` found. `rows` are the encoded rows, in the order of training data before shuffling."""

    records: list[Record]
    rows: list[Encoded]
    wheres: list[str]  # for each row, where its record stands
    report: DatasetReport
    options: DatasetOptions
    limit: int  # tokens a row may have
    lengths: list[int]  # tokens of each usable record before cutting
    n_duplicates: int  # records that say the same as an earlier one
    n_preferences: int  # rows with chosen, rejected or a label: for graft dpo
    bad: list[str]  # rows that training would refuse
    notes: list[str]  # what else training would say

    def figures(self) -> dict[str, Any]:
        """For --json."""
        quantiles = np.quantile(self.lengths, (0.5, 0.9, 0.99, 1)).astype(int).tolist() if self.lengths else [0] * 4
        names = ("tokens_p50", "tokens_p90", "tokens_p99", "tokens_max")
        return {
            **self.report.figures(),
            "n_records": len(self.records),
            "n_bad": len(self.bad),
            "n_duplicates": self.n_duplicates,
            "n_preferences": self.n_preferences,
            "max_seq_len": self.limit,
            **dict(zip(names, quantiles, strict=True)),
        }


def inspect_data(
    specs: Sequence[str | Path],
    base: Path | str,
    *,
    max_seq_len: int | None = None,  # None: the base's positions and one
    options: DatasetOptions | None = None,
    fields: Mapping[str, str] | None = None,
    chat_template: str | None = None,  # a name or a file; None: the base's own
    template_args: Mapping[str, Any] | None = None,
) -> Inspection:
    """Read and encode records as fine-tuning would. Rows that it would refuse are listed in `bad`, not raised.

    Raises ValueError or OSError for files that can't be read.
    """
    base = model_folder(base, weights=False)
    records = read_all(specs, fields)
    tokenizer = Tokenizer.load(base)
    limit = max_seq_len or load_config(base).max_seq_len + 1
    source = template_source(chat_template) if chat_template else None
    template = ChatTemplate.of(tokenizer, source, args=template_args)
    options = options or DatasetOptions()
    usable, lengths, bad = [], [], []
    for record in records:
        if record.is_preference:
            continue
        try:
            if record.empty is None or options.on_empty == "error":
                lengths.append(
                    len(encode_whole(record, tokenizer, template, special_tokens=options.special_tokens).ids)
                )
                encode_dataset([record], tokenizer, template, limit, options)
            usable.append(record)
        except ValueError as error:
            if options.on_too_long == "drop" and "longer than" in str(error):
                usable.append(record)
            else:
                bad.append(str(error))
    rows: list[Encoded] = []
    report = DatasetReport(n_records=len(records))
    if any(record.empty is None for record in usable):
        try:
            rows, report = encode_dataset(usable, tokenizer, template, limit, options)
        except ValueError as error:  # every row is too long and dropped
            bad.append(str(error))
    said = Counter(
        (r.text, r.prompt, r.completion, repr(r.messages), repr(r.chosen), repr(r.rejected)) for r in records
    )
    return Inspection(
        records=records,
        rows=rows,
        wheres=[usable[i].where for i in report.sources],
        report=report,
        options=options,
        limit=limit,
        lengths=lengths,
        n_duplicates=sum(count - 1 for count in said.values()),
        n_preferences=sum(record.is_preference for record in records),
        bad=bad,
        notes=Traits.of(records).lines(),
    )


def row_text(row: Encoded, tokenizer: Tokenizer) -> Text:
    """A row's text: what carries loss green, what is only read dim, special tokens in reverse."""
    text = Text()
    special = set(tokenizer.special_tokens.values())
    learned = row.loss_mask.copy()
    learned[0] = False  # the first token is never a label
    kinds = [(bool(on), token in special) for on, token in zip(learned, row.ids.tolist(), strict=True)]
    start = 0
    for i in range(1, len(kinds) + 1):
        if i == len(kinds) or kinds[i] != kinds[start]:
            on, is_special = kinds[start]
            style = f"{LEARNED if on else READ}{' ' + SPECIAL if is_special else ''}"
            text.append(printable(tokenizer.decode(row.ids[start:i]), keep="\n\t"), style)
            start = i
    return text


def histogram(lengths: Sequence[int], limit: int, n_bins: int = 10) -> list[str]:
    """Lines of a histogram of lengths in tokens; the limit is named where it falls."""
    if not lengths:
        return []
    counts, edges = np.histogram(lengths, bins=n_bins, range=(0, max(lengths) + 1))
    lines = []
    for count, low, high in zip(counts.tolist(), edges[:-1], edges[1:], strict=True):
        bar = "█" * round(_BAR * count / max(counts)) if count else ""
        note = f"  <- max_seq_len {limit:,}" if low <= limit < high else ""
        lines.append(f"{int(low):>9,} to {int(high):>9,} tokens {count:>8,} {bar}{note}")
    return lines


def print_inspection(found: Inspection, tokenizer: Tokenizer, console: Console, *, n_rows: int = 3) -> None:
    """Rows in colour, then counts, lengths and everything that training would say."""
    for number, row in enumerate(found.rows[:n_rows]):
        n_labels = int(row.loss_mask[1:].sum())
        console.print(Text(f"{found.wheres[number]}: {len(row.ids):,} tokens, {n_labels:,} carry loss", "bold"))
        console.print(row_text(row, tokenizer), soft_wrap=True)
        console.print()
    legend = Text.assemble(("learned", LEARNED), ", ", ("only read", READ), ", ", ("special token", SPECIAL))
    console.print(legend)
    for name, value in found.figures().items():
        console.print(f"{name}: {value:,}", highlight=False, markup=False)
    for line in histogram(found.lengths, found.limit):
        console.print(line, highlight=False, markup=False)
    for line in [*found.report.lines(found.limit, found.options), *found.notes]:
        console.print(line, highlight=False, markup=False)
    if found.n_duplicates:
        console.print(f"{found.n_duplicates:,} records repeat an earlier one", highlight=False, markup=False)
    if found.n_preferences:
        console.print(f"{found.n_preferences:,} rows hold preferences: train on them with graft dpo", markup=False)
    for message in found.bad[:5]:
        console.print(f"would be refused: {printable(message)}", highlight=False, markup=False, style="red")
    if len(found.bad) > 5:
        console.print(f"and {len(found.bad) - 5:,} more would be refused", style="red")
