"""What `--data` names -> records: files, folders, globs and Hugging Face datasets, mixed by weight, read whole or one by one."""

import glob
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

from ...base.hub import dataset_files, is_hub_name
from .messages import ROLES, Message
from .record import FORMATS, Record, to_record
from .rows import FREE_BYTES, SUFFIXES, check_regular_file, iterate_rows, suffix_of

__all__ = [
    "FORMATS", "FREE_BYTES", "ROLES", "SUFFIXES", "Message", "Record", "check_regular_file", "data_files",
    "iterate_all", "iterate_records", "join_errors", "named_files", "read_all", "read_records", "read_rows", "to_record",
]  # fmt: skip

SHOWN = 5  # bad rows that a message quotes; it counts the others


def read_records(path: str | Path, fields: Mapping[str, str] | None = None) -> list[Record]:
    """Every row of a file as a Record, in file order. `fields` gives a format's field the name it has in the file.

    The format of a row is told by its fields (FORMATS lists them), and a file holds one. Semantics are TRL's: string
    prompts and completions see no chat template, conversational ones do, Alpaca and ShareGPT become messages.

    A null or empty cell makes a Record with `empty` set, for `encode_dataset` to count, drop or refuse. TSV is plain: a
    header line, no quoting. A compressed file of more than rows.MAX_RATIO times its size (beyond FREE_BYTES) is refused.
    Raises FileNotFoundError, IsADirectoryError, or ValueError that names the file and every bad line, row or byte.
    """
    return list(iterate_records(path, fields))


def iterate_records(path: str | Path, fields: Mapping[str, str] | None = None) -> Iterator[Record]:
    """`read_records` one by one. Bad rows are left out on the way, and raise together after the last row."""
    path = Path(path)
    first: Record | None = None  # whose format all rows have
    n, faults = 0, Faults()
    for row, where in iterate_rows(path):
        n += 1
        try:
            record = to_record(row, where, fields)
            if first is None and record.format is not None:
                first = record
            if first is not None and record.format not in (None, first.format):
                raise ValueError(
                    f"{where}: its format is {record.format} where {first.where} has {first.format}; a file holds one "
                    "format: write the others to files of their own and give each as --data"
                )
        except ValueError as error:
            faults.add(str(error))
            continue
        yield record
    faults.raise_if_any()
    if not n:
        raise ValueError(f"{path} holds no rows; a training file needs at least one, with the fields {FORMATS}")


def read_rows(spec: str | Path) -> Iterator[tuple[dict, Record]]:
    """Each row of what a spec names, as it was parsed, with its Record: for rewards, which may read any of its fields.

    Raises as `read_records`, at the first bad row.
    """
    for path in data_files(spec):
        for row, where in iterate_rows(path):
            record = to_record(row, where)
            assert isinstance(row, dict)
            yield row, record


class Faults:
    """Bad rows, collected to be told together: the first few, and how many more there are."""

    def __init__(self) -> None:
        self.n, self.shown = 0, []

    def add(self, message: str) -> None:
        """One more bad row."""
        self.n += 1
        if self.n <= SHOWN:
            self.shown.append(message)

    def raise_if_any(self) -> None:
        """Raise one ValueError for all of them."""
        if self.n == 1:
            raise ValueError(self.shown[0])
        if self.n:
            more = f"; and {self.n - SHOWN:,} more" if self.n > SHOWN else ""
            raise ValueError(f"{self.n:,} rows can't be used: " + "; ".join(self.shown) + more)


def join_errors(messages: Sequence[str]) -> str:
    """One line of several messages: the first few, and how many more there are."""
    faults = Faults()
    for message in messages:
        faults.add(message)
    try:
        faults.raise_if_any()
    except ValueError as error:
        return str(error)
    return ""


# --- several files -------------------------------------------------------------------------------------------------


def read_all(specs: Sequence[str | Path], fields: Mapping[str, str] | None = None) -> list[Record]:
    """The records of several files, folders, globs and datasets, one after the other: what `--data A --data B` means.

    A spec may end in =WEIGHT (all of them, or none). Then the list is the smallest in which every record stands at least
    once and the files' shares are as the weights: the records of a file that is too small for its share are repeated in
    turn. Raises as `read_records`, and ValueError for weights that aren't positive numbers.
    """
    named = named_files(specs)
    parts = [list(_records_of(files, fields)) for files, _ in named]
    sizes = _sizes([len(part) for part in parts], [weight for _, weight in named])
    return [part[i % len(part)] for part, size in zip(parts, sizes, strict=True) for i in range(size)]


def iterate_all(specs: Sequence[str | Path], fields: Mapping[str, str] | None = None) -> Iterator[Record]:
    """`read_all`, one record at a time: of the data no more than a row is held. Weights take one reading more, to count."""
    named = named_files(specs)
    if all(weight is None for _, weight in named):
        for files, _ in named:
            yield from _records_of(files, fields)
        return
    counts = [sum(1 for _ in _records_of(files, fields)) for files, _ in named]
    sizes = _sizes(counts, [weight for _, weight in named])
    for (files, _), count, size in zip(named, counts, sizes, strict=True):
        for start in range(0, size, count):
            yield from islice(_records_of(files, fields), size - start)


def _records_of(files: Sequence[Path], fields: Mapping[str, str] | None) -> Iterator[Record]:
    for file in files:
        yield from iterate_records(file, fields)


def _sizes(counts: Sequence[int], weights: Sequence[float | None]) -> list[int]:
    """How many records of each part: all of them, and the shares as the weights."""
    shares = [weight for weight in weights if weight is not None]
    if not shares:
        return list(counts)
    unit = max(count / share for count, share in zip(counts, shares, strict=True))
    sizes = [max(count, round(unit * share)) for count, share in zip(counts, shares, strict=True)]
    if sum(sizes) > 1000 * sum(counts):
        raise ValueError(
            f"the weights would repeat {sum(counts):,} records to {sum(sizes):,}; give the smaller file more weight"
        )
    return sizes


def named_files(specs: Sequence[str | Path]) -> list[tuple[list[Path], float | None]]:
    """(files, weight) of each spec. Raises ValueError where some specs have a weight and others don't."""
    if not specs:
        raise ValueError("no data given; name at least one file, folder or glob")
    split = [_split_weight(str(spec)) for spec in specs]
    missing = [name for name, weight in split if weight is None]
    if 0 < len(missing) < len(split):
        raise ValueError(f"--data {missing[0]} has no weight while others have; give all of them one, or none")
    return [(data_files(name), weight) for name, weight in split]


def _split_weight(spec: str) -> tuple[str, float | None]:
    name, equals, text = spec.rpartition("=")
    if not equals or Path(spec).exists():
        return spec, None
    try:
        weight = float(text)
    except ValueError:
        return spec, None  # a file name that holds an equals sign
    if not (math.isfinite(weight) and weight > 0):
        raise ValueError(f"--data {spec}: the weight {text} is not a positive number; write for example {name}=0.7")
    return name, weight


def data_files(name: str | Path) -> list[Path]:
    """The data files that a file, a folder, a glob or a Hugging Face id names, in the order of their names.

    What exists here wins over an id. Raises FileNotFoundError, and what `hub.dataset_files` raises.
    """
    path = Path(name)
    if path.is_dir():
        files = [file for file in sorted(path.iterdir()) if file.is_file() and suffix_of(file) in SUFFIXES]
        if not files:
            raise FileNotFoundError(f"{path} holds no data file; graft reads {', '.join(SUFFIXES)}, each also .gz")
        return files
    if path.exists():
        return [path]
    if is_hub_name(name) and suffix_of(path) not in SUFFIXES:
        return dataset_files(str(name))
    if any(character in str(name) for character in "*?["):
        files = [Path(match) for match in sorted(glob.glob(str(name), recursive=True)) if Path(match).is_file()]
        if not files:
            raise FileNotFoundError(f"{name} matches no file; graft reads {', '.join(SUFFIXES)}, each also .gz")
        return files
    return [path]
