"""Preference rows: a prompt with a better and a worse answer (TRL, LLaMA-Factory), or one answer with a verdict (KTO)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .records import Message, Record, join_errors, read_all

Side = str | tuple[Message, ...]


@dataclass(frozen=True)
class PreferenceRecord:
    """One row. Prompt and answers are all strings (no chat template), or all messages.

    A row of pairs has both answers; a labelled row (KTO) has one, as `chosen` where it was called good, else `rejected`.
    """

    where: str  # "train.jsonl line 812", for error messages
    prompt: Side
    chosen: Side | None
    rejected: Side | None
    tools: tuple[dict, ...] | None = None
    template_args: dict[str, object] | None = None

    @property
    def is_pair(self) -> bool:
        """Whether both answers are there."""
        return self.chosen is not None and self.rejected is not None

    def answered(self, answer: Side) -> Record:
        """Prompt and one of the answers as a record for fine-tuning, whose loss is on the answer."""
        if isinstance(answer, str):
            assert isinstance(self.prompt, str)
            return Record(self.where, prompt=self.prompt, completion=answer)
        turns = tuple(self.prompt)
        rest = {"tools": self.tools, "template_args": self.template_args}
        return Record(self.where, messages=(*turns, *answer), n_prompt_messages=len(turns), **rest)  # pyright: ignore[reportArgumentType]


def to_preference(record: Record) -> PreferenceRecord:
    """A Record that `is_preference` as a PreferenceRecord.

    A prompt that is not given on its own is what both conversations (or strings) have in common, up to the last whole
    message (character). A prompt string with answers in messages becomes one user turn; a prompt in messages with answer
    strings makes each an assistant turn. Equal answers are kept: who trains on them counts them. Raises ValueError naming
    the row for a row without preferences, and for one without an answer.
    """
    if not record.is_preference:
        raise ValueError(
            f"{record.where}: no preference; a row needs prompt, chosen and rejected, or prompt, completion and label"
        )
    rest = {"tools": record.tools, "template_args": record.template_args}
    if record.label is not None and record.chosen is None and record.rejected is None:
        prompt, answer = _split(record)
        return PreferenceRecord(
            record.where, prompt, answer if record.label else None, None if record.label else answer, **rest
        )
    chosen, rejected = record.chosen, record.rejected
    if chosen is None or rejected is None:
        raise ValueError(f"{record.where}: no {'chosen' if chosen is None else 'rejected'} answer; give both")
    prompt: Side = record.messages if record.messages is not None else record.prompt or ""
    if record.messages and record.messages[-1]["role"] == "assistant" and not record.n_prompt_messages:
        prompt = record.messages[:-1]  # the row's own answer gives way to chosen and rejected
    if isinstance(prompt, tuple) or isinstance(chosen, tuple) or isinstance(rejected, tuple):
        opening: Message = {"role": "user", "content": prompt}
        turns: tuple[Message, ...] = prompt if isinstance(prompt, tuple) else (opening,) if prompt else ()
        chosen, rejected = _turns(chosen), _turns(rejected)
        if turns and chosen[: len(turns)] == turns and rejected[: len(turns)] == turns:
            chosen, rejected = chosen[len(turns) :], rejected[len(turns) :]  # TRL's older layout repeats the prompt
        if not turns:
            n = _n_common(chosen, rejected)
            turns, chosen, rejected = chosen[:n], chosen[n:], rejected[n:]
        return PreferenceRecord(record.where, turns, chosen, rejected, **rest)
    if not prompt:
        n = _n_common(chosen, rejected)
        prompt, chosen, rejected = chosen[:n], chosen[n:], rejected[n:]
    return PreferenceRecord(record.where, prompt, chosen, rejected, **rest)


def pair_labelled(rows: Sequence[PreferenceRecord]) -> tuple[list[PreferenceRecord], int]:
    """Pairs only, and how many labelled rows found no partner and were left out.

    Labelled rows of one prompt are paired in file order: the first good answer with the first bad one, and so on.
    """
    waiting: dict[str, list[PreferenceRecord]] = {}
    pairs: list[PreferenceRecord] = []
    for row in rows:
        if row.is_pair:
            pairs.append(row)
            continue
        others = waiting.setdefault(repr(row.prompt), [])
        if others and (others[0].chosen is None) != (row.chosen is None):
            first = others.pop(0)
            good, poor = (first, row) if first.chosen is not None else (row, first)
            pairs.append(replace(first, chosen=good.chosen, rejected=poor.rejected))
        else:
            others.append(row)
    return pairs, sum(len(left) for left in waiting.values())


def read_preferences(specs: Sequence[str | Path], fields: Mapping[str, str] | None = None) -> list[PreferenceRecord]:
    """Every row of files, folders and globs (`read_all`), in order. Raises ValueError naming all bad rows."""
    found, bad = [], []
    for record in read_all(specs, fields):
        try:
            found.append(to_preference(record))
        except ValueError as error:
            bad.append(str(error))
    if bad:
        raise ValueError(join_errors(bad))
    return found


def _split(record: Record) -> tuple[Side, Side]:
    """(prompt, answer) of a labelled row."""
    if record.messages is not None:
        n = record.n_prompt_messages or len(record.messages) - 1
        if not record.messages[n:] or record.messages[-1]["role"] != "assistant":
            raise ValueError(f"{record.where}: a label but no answer; end the conversation on an assistant turn")
        return record.messages[:n], record.messages[n:]
    if record.completion is None:
        raise ValueError(f"{record.where}: a label but no completion; give the answer that it judges")
    return record.prompt or "", record.completion


def _turns(answer: Side) -> tuple[Message, ...]:
    return ({"role": "assistant", "content": answer},) if isinstance(answer, str) else answer


def _n_common(a: Sequence[object], b: Sequence[object]) -> int:
    """Length of the common beginning, leaving each at least one item."""
    n = min(len(a), len(b)) - 1
    return next((i for i in range(n) if a[i] != b[i]), max(n, 0))
