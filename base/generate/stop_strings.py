"""Strings that end a text, found also where they span several tokens."""

from collections.abc import Sequence


class StopStrings:
    """Takes a text piece by piece and hands on what can't be the beginning of a stop string any more.

    The text ends before the first stop string in it. With no stop strings every piece goes straight through.
    Raises ValueError for an empty stop string, which every text would hold.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if "" in stops:
            raise ValueError("a stop string is empty; leave it out")
        self.stops = tuple(stops)
        self._held = ""

    def push(self, piece: str) -> tuple[str, bool]:
        """What may be shown now, and whether the text ended."""
        if not self.stops:
            return piece, False
        text = self._held + piece
        ends = [at for stop in self.stops if (at := text.find(stop)) >= 0]
        if ends:
            self._held = ""
            return text[: min(ends)], True
        n_held = 0
        for stop in self.stops:
            for n in range(min(len(stop) - 1, len(text)), n_held, -1):
                if text.endswith(stop[:n]):
                    n_held = n
                    break
        self._held = text[len(text) - n_held :]
        return text[: len(text) - n_held], False

    def flush(self) -> str:
        """What was held back: the text ended for another reason."""
        held, self._held = self._held, ""
        return held
