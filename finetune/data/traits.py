"""What is known of records without holding them: each `add` sees one, as they pass on their way to be encoded."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from .record import Record
from .shape import PromptShape


class Observer(Protocol):
    """Sees records as they pass."""

    def add(self, record: Record) -> None: ...


def observed(records: Iterable[Record], *observers: Observer) -> Iterator[Record]:
    """The records, each of which the observers see first."""
    for record in records:
        for observer in observers:
            observer.add(record)
        yield record


class Traits:
    """What the records of a run have in common: how they speak to the model, the shape of their prompts, fields unread."""

    def __init__(self) -> None:
        self.is_chat, self.shape, self.unused = False, PromptShape(), Counter[str]()

    @classmethod
    def of(cls, records: Iterable[Record]) -> "Traits":
        """Those of all the records."""
        traits = cls()
        for record in records:
            traits.add(record)
        return traits

    def add(self, record: Record) -> None:
        """One more record."""
        self.is_chat = self.is_chat or record.messages is not None
        self.shape.add(record)
        self.unused.update(record.unused)

    def lines(self) -> list[str]:
        """What a user should know of the fields, in at most one sentence."""
        if not self.unused:
            return []
        names = ", ".join(f"{name} ({count:,})" for name, count in self.unused.most_common(8))
        more = f" and {len(self.unused) - 8} more" if len(self.unused) > 8 else ""
        return [f"fields that nothing reads: {names}{more} (--field gives one its meaning, such as prompt=question)"]


class Overlap:
    """How many distinct evaluation records stand among the training records too."""

    def __init__(self, held_out: Sequence[Record]) -> None:
        self._held_out = {content(record) for record in held_out if record.empty is None}
        self._found: set[int] = set()

    def add(self, record: Record) -> None:
        """One more training record."""
        if self._held_out and record.empty is None and (said := content(record)) in self._held_out:
            self._found.add(said)

    def __len__(self) -> int:
        return len(self._found)


def content(record: Record) -> int:
    """A hash of what the record says, wherever it stands."""
    return hash((record.text, record.prompt, record.completion, repr(record.messages)))
