"""The shape that all prompts of a task share: what stands before and after the part that differs."""

from collections.abc import Iterable, Mapping

from .record import Record

LONGEST = 2000  # characters of either side


class PromptShape:
    """The shape of prompts that come one by one: the first and the last of them, in the order of their characters, forwards and
    backwards, share what all of them share."""

    def __init__(self) -> None:
        self._forwards: tuple[str, str] | None = None
        self._backwards: tuple[str, str] | None = None
        self._shortest, self._is_prompt = 0, True

    def add(self, record: Record) -> None:
        """One more record."""
        prompt = record.prompt
        if prompt is None:
            self._is_prompt = False
        elif self._is_prompt:
            self._forwards = _widened(self._forwards, prompt)
            self._backwards = _widened(self._backwards, prompt[::-1])
            self._shortest = len(prompt) if self._forwards[0] == self._forwards[1] else min(self._shortest, len(prompt))

    def result(self) -> dict[str, str] | None:
        """{"before": "Message: ", "after": "\\nLabel:"}; None where the prompts have nothing in common.

        Both sides end at a word's end, so that prompts which happen to begin with one letter share nothing.
        """
        if not self._is_prompt or self._forwards is None or self._forwards[0] == self._forwards[1]:
            return None
        assert self._backwards is not None
        before = _common_start(*self._forwards)
        before = before[: 1 + max((i for i, c in enumerate(before) if c.isspace()), default=-1)]
        after = _common_start(*self._backwards)[: self._shortest - len(before)][::-1]
        after = after[next((i for i, c in enumerate(after) if c.isspace()), len(after)) :]
        if not before + after or len(before) > LONGEST or len(after) > LONGEST:
            return None
        return {"before": before, "after": after}


def prompt_shape(records: Iterable[Record]) -> dict[str, str] | None:
    """The shape of records with string prompts; None where they have nothing in common."""
    shape = PromptShape()
    for record in records:
        shape.add(record)
    return shape.result()


def _widened(range_: tuple[str, str] | None, text: str) -> tuple[str, str]:
    """(first, last) of the texts so far and this one, in the order of their characters."""
    return (text, text) if range_ is None else (min(range_[0], text), max(range_[1], text))


def _common_start(low: str, high: str) -> str:
    """What two texts share at their beginning; where they are the first and last of many, what all of them share."""
    n = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))
    return low[:n]


def in_shape(text: str, shape: Mapping[str, str]) -> str:
    """The text as a prompt of the task; a text that has the shape already stays as it is."""
    before, after = shape["before"], shape["after"]
    if text.startswith(before) and text.endswith(after):
        return text
    return f"{before}{text}{after}"
