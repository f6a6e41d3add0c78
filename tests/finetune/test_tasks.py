"""Generated tasks: the evaluation is made of known words in unknown combinations, and no simple rule solves it."""

import re
from collections import Counter
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest

from graft.finetune.data.records import Record, read_records
from graft.finetune.tasks import (
    BAD,
    GOOD,
    HARMLESS,
    NEWS,
    OBJECTS,
    PEOPLE,
    PRONOUNS,
    RISKY,
    TASKS,
    VERBS,
    make_task,
    translate,
    write_task,
)

Pair = tuple[str, str]
CLASSIFICATION = ("spam", "sentiment")


@lru_cache(maxsize=8)
def task(name: str) -> tuple[list[Record], list[Record]]:
    return make_task(name, 0, 2000, 300)


def words(records: list[Record]) -> set[str]:
    return {word for r in records for word in re.findall(r"\w+|[^\w\s]", f"{r.prompt} {r.completion}")}


def first(fillers: tuple[str, ...], text: str) -> str:
    """The filler that stands in the text; several or none would be a mistake of the grammar."""
    (found,) = (f for f in fillers if re.search(rf"\b{f}\b", text))
    return found


def pairs(name: str, record: Record) -> set[Pair]:
    """The word pairs that a sentence is made of, read off the text alone (not from the generator's own list)."""
    text = (record.prompt or "").split("\n")[0]
    if name == "spam":
        done = first(RISKY if record.completion == " spam" else HARMLESS, text)
        pair = {(first(NEWS, text), done)}
        others = [f for f in (*RISKY, *HARMLESS) if f in text and f != done]
        return pair | {(done, other) for other in others}
    if name == "sentiment":
        adjectives = "|".join((*GOOD, *BAD))
        found = re.findall(rf"the (\w+) was ([a-z ]*?)({adjectives})\b", text)
        return {(thing, word) for thing, _, word in found} | {
            (negator, word) for _, negator, word in found if "n" in negator
        }
    english = text.removeprefix("English: ")
    verb = first(tuple(f"{v}s?" for v in VERBS), english).removesuffix("s?")
    subject = re.search(rf"\b({'|'.join((*PRONOUNS, *PEOPLE))})\b", english)
    thing = first(tuple(OBJECTS), english)
    assert subject
    return {(verb, thing), (subject.group(), thing)}


@pytest.mark.parametrize("name", list(TASKS))
def test_held_out_combinations_of_known_words(name: str) -> None:
    """Law: no evaluation prompt, and no pair of an evaluation sentence, is in training; every word of it is."""
    train, held_out = task(name)
    assert not {r.prompt for r in train} & {r.prompt for r in held_out}
    assert words(held_out) <= words(train)
    seen = {pair for record in train for pair in pairs(name, record)}
    assert not [pair for record in held_out for pair in pairs(name, record) if pair in seen]
    assert len(seen) > 100


@pytest.mark.parametrize("name", list(TASKS))
def test_prompts_are_distinct_short_and_repeatable(name: str) -> None:
    train, held_out = task(name)
    assert len({r.prompt for r in (*train, *held_out)}) == 2300
    assert max(len((r.prompt or "").split()) for r in (*train, *held_out)) <= 25
    assert make_task(name, 0, 2000, 300) == (train, held_out)
    other_train, other_held_out = make_task(name, 1, 2000, 300)
    assert other_train != train
    assert not {r.prompt for r in train} & {r.prompt for r in other_held_out}, "splits are disjoint across seeds"


@pytest.mark.parametrize("name", CLASSIFICATION)
def test_labels_are_balanced(name: str) -> None:
    for records in task(name):
        assert set(Counter(r.completion for r in records).values()) == {len(records) // 2}


# --- what simple rules reach ---------------------------------------------------------------------------------------


def unigram_accuracy(train: list[Record], held_out: list[Record]) -> float:
    """Logistic regression on word counts, to convergence: the best that any weighing of single words does."""
    vocabulary = {word: i for i, word in enumerate(sorted(words(train)))}

    def counts(records: list[Record]) -> np.ndarray:
        table = np.zeros((len(records), len(vocabulary)))
        for row, record in enumerate(records):
            for word in re.findall(r"\w+|[^\w\s]", record.prompt or ""):
                table[row, vocabulary[word]] += 1
        return table

    label = train[0].completion
    x, y = counts(train), np.array([r.completion == label for r in train])
    weights, bias = np.zeros(x.shape[1]), 0.0
    for _ in range(500):
        error = 1 / (1 + np.exp(-(x @ weights + bias))) - y
        weights, bias = weights - 0.5 * x.T @ error / len(y), bias - 0.5 * error.mean()
    right = (counts(held_out) @ weights + bias > 0) == np.array([r.completion == label for r in held_out])
    return float(right.mean())


def lookup_accuracy(train: list[Record], held_out: list[Record]) -> float:
    """Copy the answer of the training prompt that shares most words."""
    bags = [set((r.prompt or "").split()) for r in train]

    def copied(prompt: str) -> str | None:
        query = set(prompt.split())
        best = max(range(len(bags)), key=lambda i: len(bags[i] & query) / len(bags[i] | query))
        return train[best].completion

    return float(np.mean([copied(r.prompt or "") == r.completion for r in held_out]))


@pytest.mark.parametrize("name", CLASSIFICATION)
def test_counting_words_is_not_enough(name: str) -> None:
    """Clearly below the 95% that an adapter must reach: the label lies in which words belong together."""
    assert unigram_accuracy(*task(name)) < 0.85


@pytest.mark.parametrize("name", list(TASKS))
def test_looking_up_the_nearest_sentence_is_not_enough(name: str) -> None:
    train, held_out = task(name)
    assert lookup_accuracy(train, held_out[:100]) < (0.9 if name in CLASSIFICATION else 0.05)


# --- worked by hand ----------------------------------------------------------------------------------------------


def test_german_by_hand() -> None:
    """Gender, case, verb second, nicht after a definite object, kein for an indefinite one, questions verb first."""
    for form, parts, english, german in [
        ("statement", ("the man", "buy", "the dog"), "the man buys the dog.", "der Mann kauft den Hund."),
        ("statement", ("a woman", "love", "a ring"), "a woman loves a ring.", "eine Frau liebt einen Ring."),
        ("statement", ("my child", "seek", "my cat"), "my child seeks my cat.", "mein Kind sucht meine Katze."),
        ("statement", ("a friend", "know", "the house"), "a friend knows the house.", "ein Freund kennt das Haus."),
        ("adverb first", ("we", "buy", "my book", "today"), "today we buy my book.", "heute kaufen wir mein Buch."),
        ("adverb first", ("my friend", "bring", "a letter", "often"),
         "often my friend brings a letter.", "oft bringt mein Freund einen Brief."),
        ("negation", ("i", "need", "the lamp"), "i do not need the lamp.", "ich brauche die Lampe nicht."),
        ("negation", ("she", "paint", "a ball"), "she does not paint a ball.", "sie malt keinen Ball."),
        ("negation", ("we", "know", "a book"), "we do not know a book.", "wir kennen kein Buch."),
        ("negation", ("he", "show", "a rose"), "he does not show a rose.", "er zeigt keine Rose."),
        ("question", ("he", "love", "my bread"), "does he love my bread?", "liebt er mein Brot?"),
        ("question", ("i", "show", "a map"), "do i show a map?", "zeige ich eine Karte?"),
    ]:  # fmt: skip
        assert translate(form, *parts) == (english, german)


def test_labels_by_hand() -> None:
    """The clause that counts decides: the negated request is not made, the main clause outweighs the other."""
    for name, rule in {"spam": spam_by_hand, "sentiment": sentiment_by_hand}.items():
        for records in task(name):
            wrong = [r for r in records if rule((r.prompt or "").split("\n")[0]) != (r.completion or "").strip()]
            assert not wrong, wrong[0]


def spam_by_hand(text: str) -> str:
    asked = re.sub(rf"(do not|never) ({'|'.join((*RISKY, *HARMLESS))})", "", text)
    return "spam" if any(request in asked for request in RISKY) else "ham"


def sentiment_by_hand(text: str) -> str:
    if " but " in text:
        main = text.split(" but ")[1]
    elif re.search(r"even if .*, the", text):
        main = text.split(", the")[1]
    else:
        main = re.split(r", (?:though|even if)", text)[0]
    positive = any(re.search(rf"\b{word}\b", main) for word in GOOD)
    negated = re.search(r"\b(not|never)\b", main) is not None
    return "positive" if positive != negated else "negative"


# --- files and errors --------------------------------------------------------------------------------------------


def test_written_files_read_back(tmp_path: Path) -> None:
    write_task(tmp_path / "spam", "spam", n_train=20, n_eval=10)
    train, held_out = make_task("spam", 0, 20, 10)
    for split, records in (("train", train), ("eval", held_out)):
        read = read_records(tmp_path / "spam" / f"{split}.jsonl")
        assert [(r.prompt, r.completion) for r in read] == [(r.prompt, r.completion) for r in records]


def test_wrong_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown task 'poetry'; choose spam, sentiment, translation"):
        make_task("poetry", 0, 1, 1)
    with pytest.raises(ValueError, match=r"the sentiment grammar has only about .* distinct eval sentences, 9000 were"):
        make_task("sentiment", 0, 1, 9000)
