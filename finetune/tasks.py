"""Three small tasks that the project writes itself: spam detection, sentiment, translation (English to German).

Each is a seeded grammar whose answer depends on how words combine, so that counting words is not enough:

    spam         the same risky and harmless requests stand in both classes; what decides is which one is negated
    sentiment    negation flips an adjective; of two clauses joined by but or even if, the main one decides
    translation  German wants the verb second, gender and case on every article, and `kein` for a negated `a`

Held out are pairs of words on a lattice (a quarter of all pairs, spread evenly): an evaluation sentence is made of held
out pairs alone, a training sentence of none, so every word of the evaluation is known and every combination is new.
"""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..base.checkpoint import write_file
from .data.records import Record


@dataclass(frozen=True)
class Sentence:
    source: str
    answer: str
    pairs: tuple[tuple[int, int], ...]  # indices of the fillers that stand together, on the lattice of all pairs


@dataclass(frozen=True)
class Task:
    """A grammar: `sample(rng, form, label)` draws one sentence of a form (and of a label, where the task has labels)."""

    prompt: str  # with {source}
    forms: tuple[int, ...]  # in turn; a form that stands here twice comes twice as often
    labels: tuple[str, ...]  # empty: the answer is free text
    sample: Callable[[random.Random, int, str | None], Sentence]


def held_out(pair: tuple[int, int]) -> bool:
    """A quarter of the lattice, in diagonals: every row and every column keeps three quarters of its pairs."""
    return (pair[0] + pair[1]) % 4 == 0


# --- spam ----------------------------------------------------------------------------------------------------------

NAMES = ("", "sam, ", "max, ", "ben, ", "tom, ")
NEWS = ("you won", "free offer", "last call", "good news", "we are home", "i am late", "it is time", "thank you")
RISKY = (
    "send your key", "open the link", "sign the form", "give your code",
    "enter your address", "follow the link", "copy the token", "pay the fee",
)  # fmt: skip
HARMLESS = (
    "read the text", "call your parent", "close the window", "start the test",
    "find the page", "write the report", "check the time", "print the list",
)  # fmt: skip
ASK = ("please {do}.", "{do} now.", "now {do}.", "just {do}.", "{do} first.")
ASK_AND_FORBID = ("do not {skip}, {do}.", "never {skip}, {do}.", "{do}, do not {skip}.", "{do}, never {skip}.")


def _spam(rng: random.Random, form: int, label: str | None) -> Sentence:
    news, wanted, forbidden = rng.randrange(len(NEWS)), rng.randrange(len(RISKY)), rng.randrange(len(RISKY))
    do, skip = (RISKY, HARMLESS) if label == "spam" else (HARMLESS, RISKY)
    requests = ASK if form == 0 else ASK_AND_FORBID
    request = rng.choice(requests).format(do=do[wanted], skip=skip[forbidden])
    source = f"{rng.choice(NAMES)}{NEWS[news]}. {request}"
    return Sentence(source, label or "", ((news, wanted),) if form == 0 else ((news, wanted), (wanted, forbidden)))


# --- sentiment -----------------------------------------------------------------------------------------------------

THINGS = ("search", "help", "menu", "text", "parser", "test", "tool", "screen", "report", "editor")
GOOD = ("good", "clear", "simple", "useful", "safe", "complete", "correct", "fast")
BAD = ("bad", "empty", "wrong", "slow", "broken", "poor", "weak", "strange")
OPENERS = ("", "i think ", "to me ", "we found ", "so far ", "in short ")
ADVERBS = ("", "very ", "really ", "so ", "just ")
NEGATORS = ("not ", "never ", "not very ", "not so ")
CONTRASTS = (
    "the {n} was {weak}, but the {m} was {main}.", "even if the {n} was {weak}, the {m} was {main}.",
    "the {m} was {main}, even if the {n} was {weak}.", "the {m} was {main}, though the {n} was {weak}.",
)  # fmt: skip


def _sentiment(rng: random.Random, form: int, label: str | None) -> Sentence:
    adjectives, others = (GOOD, BAD) if label == "positive" else (BAD, GOOD)
    thing, a, opener = rng.randrange(len(THINGS)), rng.randrange(len(GOOD)), rng.choice(OPENERS)
    noun = THINGS[thing]
    if form == 0:
        return Sentence(f"{opener}the {noun} was {rng.choice(ADVERBS)}{adjectives[a]}.", label or "", ((thing, a),))
    if form == 1:
        negator = rng.randrange(len(NEGATORS))
        text = f"{opener}the {noun} was {NEGATORS[negator]}{others[a]}."
        return Sentence(text, label or "", ((thing, a), (negator, a)))
    other, b = (thing + rng.randrange(1, len(THINGS))) % len(THINGS), rng.randrange(len(BAD))
    text = rng.choice(CONTRASTS).format(n=THINGS[other], weak=others[b], m=noun, main=adjectives[a])
    return Sentence(opener + text, label or "", ((thing, a), (other, b)))


# --- translation ---------------------------------------------------------------------------------------------------

PRONOUNS = {"i": ("ich", "e"), "we": ("wir", "en"), "she": ("sie", "t"), "he": ("er", "t")}  # verb ending
PEOPLE = {"man": ("Mann", "m"), "friend": ("Freund", "m"), "woman": ("Frau", "f"), "child": ("Kind", "n")}
OBJECTS = {
    "dog": ("Hund", "m"), "ball": ("Ball", "m"), "letter": ("Brief", "m"), "ring": ("Ring", "m"),
    "cat": ("Katze", "f"), "lamp": ("Lampe", "f"), "map": ("Karte", "f"), "rose": ("Rose", "f"),
    "book": ("Buch", "n"), "house": ("Haus", "n"), "bread": ("Brot", "n"), "picture": ("Bild", "n"),
}  # fmt: skip
VERBS = {
    "buy": "kauf", "seek": "such", "love": "lieb", "bring": "bring", "need": "brauch", "know": "kenn", "paint": "mal",
    "show": "zeig",
}  # fmt: skip
FORMS = ("statement", "adverb first", "negation", "question")
ADVERBIALS = {"today": "heute", "now": "jetzt", "often": "oft", "here": "hier"}
ARTICLES = {  # determiner -> (nominative, accusative) by gender
    "the": {"m": ("der", "den"), "f": ("die", "die"), "n": ("das", "das")},
    "a": {"m": ("ein", "einen"), "f": ("eine", "eine"), "n": ("ein", "ein")},
    "my": {"m": ("mein", "meinen"), "f": ("meine", "meine"), "n": ("mein", "mein")},
}


def _translation(rng: random.Random, form: int, label: str | None) -> Sentence:
    subjects = (*PRONOUNS, *PEOPLE)
    s, v, o = rng.randrange(len(subjects)), rng.randrange(len(VERBS)), rng.randrange(len(OBJECTS))
    owner, determiner, adverb = rng.choice(tuple(ARTICLES)), rng.choice(tuple(ARTICLES)), rng.choice(tuple(ADVERBIALS))
    subject = subjects[s] if subjects[s] in PRONOUNS else f"{owner} {subjects[s]}"
    english, german = translate(FORMS[form], subject, tuple(VERBS)[v], f"{determiner} {tuple(OBJECTS)[o]}", adverb)
    return Sentence(english, german, ((s, o), (v, o)))


def translate(form: str, subject: str, verb: str, thing: str, adverb: str = "") -> tuple[str, str]:
    """(English, German) of one sentence: "today", "the man", "buy", "a book" -> "heute kauft der Mann ein Buch."

    form: statement, adverb first, negation or question.
    """
    if subject in PRONOUNS:
        german_subject, ending = PRONOUNS[subject]
    else:
        german_subject, ending = _noun_phrase(subject, PEOPLE, accusative=False), "t"
    german_thing = _noun_phrase(thing, OBJECTS, accusative=True)
    german_verb, third = VERBS[verb] + ending, ending == "t"
    said, do = (f"{verb}s", "does") if third else (verb, "do")
    if form == "statement":
        return f"{subject} {said} {thing}.", f"{german_subject} {german_verb} {german_thing}."
    if form == "adverb first":
        return (
            f"{adverb} {subject} {said} {thing}.",
            f"{ADVERBIALS[adverb]} {german_verb} {german_subject} {german_thing}.",
        )
    if form == "negation":
        negated = f"k{german_thing}" if thing.startswith("a ") else f"{german_thing} nicht"
        return f"{subject} {do} not {verb} {thing}.", f"{german_subject} {german_verb} {negated}."
    return f"{do} {subject} {verb} {thing}?", f"{german_verb} {german_subject} {german_thing}?"


def _noun_phrase(english: str, nouns: dict[str, tuple[str, str]], *, accusative: bool) -> str:
    determiner, noun = english.split()
    german, gender = nouns[noun]
    return f"{ARTICLES[determiner][gender][accusative]} {german}"


# --- splits --------------------------------------------------------------------------------------------------------

TASKS = {
    "spam": Task("Message: {source}\nLabel:", (0, 1), ("spam", "ham"), _spam),
    "sentiment": Task("Review: {source}\nSentiment:", (0, 0, 1, 2), ("positive", "negative"), _sentiment),
    "translation": Task("English: {source}\nGerman:", tuple(range(len(FORMS))), (), _translation),
}


def make_task(name: str, seed: int, n_train: int, n_eval: int) -> tuple[list[Record], list[Record]]:
    """(training records, evaluation records) of one task: distinct prompts, labels and forms in equal parts.

    The completion opens with a space and is scored by exact match. The same arguments give the same records; whatever
    the seeds, no training record of one is an evaluation record of another. Raises ValueError when the grammar has
    fewer distinct sentences than asked for.
    """
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; choose {', '.join(TASKS)}")
    rng = random.Random(f"{name} {seed}")
    return _draw(name, "train", n_train, rng), _draw(name, "eval", n_eval, rng)


def _draw(name: str, split: str, n: int, rng: random.Random) -> list[Record]:
    task, seen, records = TASKS[name], set(), []
    labels: Sequence[str | None] = task.labels or (None,)
    for i in range(n):
        form, label = task.forms[(i // len(labels)) % len(task.forms)], labels[i % len(labels)]
        for _ in range(10_000):
            sentence = task.sample(rng, form, label)
            if sentence.source not in seen and all(held_out(pair) == (split == "eval") for pair in sentence.pairs):
                break
        else:
            raise ValueError(f"the {name} grammar has only about {i} distinct {split} sentences, {n} were asked for")
        seen.add(sentence.source)
        prompt = task.prompt.format(source=sentence.source)
        records.append(Record("", prompt=prompt, completion=f" {sentence.answer}"))
    rng.shuffle(records)
    return [Record(f"{name} {split} {i}", prompt=r.prompt, completion=r.completion) for i, r in enumerate(records, 1)]


def write_task(folder: str | Path, name: str, *, seed: int = 0, n_train: int = 2000, n_eval: int = 200) -> None:
    """Write `train.jsonl` and `eval.jsonl` (prompt, completion) of one task into a folder."""
    for split, records in zip(("train", "eval"), make_task(name, seed, n_train, n_eval), strict=True):
        lines = (json.dumps({"prompt": r.prompt, "completion": r.completion}, ensure_ascii=False) for r in records)
        write_file(Path(folder) / f"{split}.jsonl", "".join(f"{line}\n" for line in lines))
