"""Conversations for the demo: questions about Python's built-in functions, follow-ups, and a reader who asks again.

    user       please describe sorted.
    assistant  it gives a new list.
    user       and len?
    assistant  it counts the items of an object.

Held out are pairs of a question and a function on a lattice, as in tasks.py: an evaluation conversation is made of held out
pairs alone, a training one of none. The last answer is scored; it may ask for the words of the one before.
"""

import json
import random
from pathlib import Path

from ...base.checkpoint import write_file
from ..data.records import Message, Record
from ..tasks import held_out

FUNCTIONS = {
    "len": "it counts the items.", "open": "it opens a file.", "print": "it writes text.", "sum": "it adds numbers.",
    "max": "it finds the largest item.", "min": "it finds the smallest item.", "type": "it names the class.",
    "input": "it reads a line.", "sorted": "it gives a new list.", "round": "it rounds a number.",
    "map": "it calls a function.", "help": "it shows the text.",
}  # fmt: skip
QUESTIONS = (
    "what does {f} do?", "tell me about {f}.", "what is {f} for?", "explain {f}.", "how do i use {f}?", "please describe {f}.",
    "when do i need {f}?", "i do not know {f}.",
)  # fmt: skip
FOLLOW_UPS = ("and {f}?", "what about {f}?", "now {f}.", "then {f}?")
AGAIN = ("say that again.", "again, please.", "what did you say?", "once more.")


def _conversation(rng: random.Random, *, evaluation: bool) -> list[Message]:
    """One or two questions with their answers; a second one names another function, or asks for the first answer again."""
    names = tuple(FUNCTIONS)

    def ask(forms: tuple[str, ...]) -> tuple[str, str]:
        while True:
            form, index = rng.randrange(len(forms)), rng.randrange(len(names))
            if held_out((form, index)) == evaluation:
                return forms[form].format(f=names[index]), FUNCTIONS[names[index]]

    turns = [ask(QUESTIONS)]
    kind = rng.randrange(4)  # half are one question
    if kind == 2:
        turns.append(ask(FOLLOW_UPS))
    elif kind == 3:
        turns.append((rng.choice(AGAIN), turns[0][1]))
    return [
        {"role": role, "content": text}
        for question, answer in turns
        for role, text in (("user", question), ("assistant", answer))
    ]


def make_talks(seed: int, n_train: int, n_eval: int) -> tuple[list[Record], list[Record]]:
    """(training records, evaluation records). The evaluation's are distinct; the same arguments give the same records."""
    rng = random.Random(f"talks {seed}")
    train = [_conversation(rng, evaluation=False) for _ in range(n_train)]
    held, seen = [], set()
    for _ in range(20 * n_eval):
        talk = _conversation(rng, evaluation=True)
        if len(held) < n_eval and (key := json.dumps(talk)) not in seen:
            seen.add(key)
            held.append(talk)
    if len(held) < n_eval:
        raise ValueError(
            f"the grammar has only about {len(held)} distinct evaluation conversations, {n_eval} were asked for"
        )
    return tuple(
        [Record(f"chat {split} {i}", messages=tuple(talk)) for i, talk in enumerate(talks, 1)]
        for split, talks in (("train", train), ("eval", held))
    )  # pyright: ignore[reportReturnType]


def write_talks(folder: str | Path, *, seed: int = 0, n_train: int = 2000, n_eval: int = 200) -> None:
    """Write `train.jsonl` and `eval.jsonl` (messages) into a folder."""
    for split, records in zip(("train", "eval"), make_talks(seed, n_train, n_eval), strict=True):
        lines = (json.dumps({"messages": record.messages}) for record in records)
        write_file(Path(folder) / f"{split}.jsonl", "".join(f"{line}\n" for line in lines))
