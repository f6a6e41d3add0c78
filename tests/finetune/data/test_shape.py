"""The shape of a task's prompts, and text made harmless: worked by hand."""

import pytest

from graft.base.text.printable import printable
from graft.finetune.data.records import Record
from graft.finetune.data.shape import in_shape, prompt_shape


def records(*prompts: str | None) -> list[Record]:
    return [Record("r", text="x") if p is None else Record("r", prompt=p, completion=" y") for p in prompts]


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        (("Message: you won.\nLabel:", "Message: your key.\nLabel:"), {"before": "Message: ", "after": "\nLabel:"}),
        (("say one", "say two", "say three"), {"before": "say ", "after": ""}),
        (("one\n=", "one two\n="), {"before": "", "after": "\n="}),
        (("cat", "car"), None),  # a letter in common is no shape
        (("a b", "a b"), None),  # one prompt: what differs isn't known
        (("a b c", "a b d", None), None),
        (("x y", "x y z"), {"before": "x ", "after": ""}),
    ],
    ids=str,
)
def test_the_shape_by_hand(prompts: tuple[str | None, ...], expected: dict[str, str] | None) -> None:
    """Worked by hand: what all prompts begin and end with, to a word's end; both never overlap."""
    assert prompt_shape(records(*prompts)) == expected


def test_a_line_takes_the_shape_once() -> None:
    shape = {"before": "Message: ", "after": "\nLabel:"}
    assert in_shape("you won", shape) == "Message: you won\nLabel:"
    assert in_shape("Message: you won\nLabel:", shape) == "Message: you won\nLabel:"


def test_control_characters_are_escaped() -> None:
    """Worked by hand: ESC, C1, carriage return and bidirectional marks; letters, line breaks, emoji and spaces stay."""
    assert printable("a\x1b[2J\x9b31m\r\u202eb", keep="\n\t") == "a\\x1b[2J\\x9b31m\\r\\u202eb"
    kept = "é 漢\n\t\u00a0\u3000👩\u200d💻"
    assert printable(kept, keep="\n\t") == kept
    assert printable("\ud800") == "\\ud800"
