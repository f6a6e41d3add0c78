"""The shape that all prompts of a task share: what stands before and after the part that differs."""

from collections.abc import Mapping, Sequence

from .records import Record

LONGEST = 2000  # characters of either side


def prompt_shape(records: Sequence[Record]) -> dict[str, str] | None:
    """{"before": "Message: ", "after": "\\nLabel:"} of records with string prompts; None where they have nothing in common.

    Both sides end at a word's end, so that prompts which happen to begin with one letter share nothing.
    """
    prompts = sorted({record.prompt for record in records if record.prompt is not None})
    if len(prompts) < 2 or any(record.prompt is None for record in records):
        return None
    before = _common_start(prompts)
    before = before[: 1 + max((i for i, c in enumerate(before) if c.isspace()), default=-1)]
    rests = [prompt[len(before) :] for prompt in prompts]
    after = _common_start([rest[::-1] for rest in rests])[::-1]
    after = after[next((i for i, c in enumerate(after) if c.isspace()), len(after)) :]
    if not before + after or len(before) > LONGEST or len(after) > LONGEST:
        return None
    return {"before": before, "after": after}


def _common_start(texts: Sequence[str]) -> str:
    low, high = min(texts), max(texts)  # what these two share, all do
    n = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))
    return low[:n]


def in_shape(text: str, shape: Mapping[str, str]) -> str:
    """The text as a prompt of the task; a text that has the shape already stays as it is."""
    before, after = shape["before"], shape["after"]
    if text.startswith(before) and text.endswith(after):
        return text
    return f"{before}{text}{after}"
