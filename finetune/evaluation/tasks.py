"""Benchmarks from files: rows -> questions of one of five kinds, asked as lm-evaluation-harness asks them.

    choice    query, choices, gold: which choice is most probable after the query         ARC, PIQA, OpenBookQA, COPA, HellaSwag
    cloze     context_options, continuation, gold: after which context the continuation is   WinoGrande
    pair      sentence_good, sentence_bad: which sentence is more probable                BLiMP
    lastword  context, continuation: whether the greedy continuation is the one           LAMBADA
    answer    context, answer: whether the number that the model writes is the one        SVAMP

Rows as the Hugging Face sets have them are read too (ARC's question and answerKey, PIQA's goal and sol1, ...).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from ..data.records import join_errors
from .files import rows_of

Kind = Literal["choice", "cloze", "pair", "lastword", "answer"]
BETWEEN_SHOTS = "\n\n"


@dataclass(frozen=True)
class Question:
    """One row of a benchmark. The continuations hold the space before them."""

    where: str  # "arc_easy.jsonl.gz line 7", for error messages
    contexts: tuple[str, ...]  # one for all continuations; cloze: one for each
    continuations: tuple[str, ...]
    gold: int  # index of the right one
    lengths: tuple[int, ...] = ()  # characters of the choices, which acc_norm divides by
    part: str | None = None  # BLiMP's paradigm, such as causative
    family: str | None = None  # and what it belongs to, such as argument_structure


@dataclass(frozen=True)
class Benchmark:
    """A named file of questions."""

    name: str
    kind: Kind
    questions: list[Question]
    n_shots: int = 0  # rows of the file that stand, solved, before each question, and are not asked


# How a query becomes a context, by the benchmark's name; others stand as they are.
ASKED = {"arc": "{}\nAnswer:", "piqa": "{}\nAnswer:", "svamp": "Question: {}\nAnswer:"}


def read_benchmark(
    file: Path | str,
    *,
    name: str | None = None,  # None: the file's, without its endings
    kind: str | None = None,  # None: told by the rows' fields
    limit: int | None = None,  # of the questions, the first so many
    n_shots: int = 0,
) -> Benchmark:
    """Read a benchmark's rows: JSON lines (also .gz, or many files in a .zip), or HellaSwag's blocks of six lines in .bz2.

    Raises FileNotFoundError, or ValueError that names every bad row, an unknown kind, or shots where there are too few rows.
    """
    file = Path(file)
    if kind is not None and kind not in get_args(Kind):
        raise ValueError(f"--kind {kind!r} is unknown; choose {', '.join(get_args(Kind))}")
    if n_shots < 0:
        raise ValueError(f"--shots {n_shots} must be >= 0")
    name = name or file.name.partition(".")[0]
    asked = next((text for start, text in ASKED.items() if name.lower().startswith(start)), "{}")
    questions: list[Question] = []
    bad: list[str] = []
    found: str | None = kind
    wanted = None if limit is None else limit + n_shots
    for number, (where, row) in enumerate(rows_of(file)):
        if wanted is not None and number >= wanted:
            break
        try:
            found = found or kind_of(row, where)
            questions.append(READERS[found](row, where, asked))
        except ValueError as error:
            bad.append(str(error) if str(error).startswith(where) else f"{where}: {error}")
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            bad.append(f"{where}: not a row of kind {found} ({type(error).__name__}: {error}); it has {_fields(row)}")
    if bad:
        raise ValueError(join_errors(bad))
    if len(questions) <= n_shots:
        raise ValueError(f"{file} holds {len(questions)} rows; with --shots {n_shots} none is left to ask")
    benchmark = Benchmark(name, found, questions)  # pyright: ignore[reportArgumentType]
    return with_shots(benchmark, n_shots) if n_shots else benchmark


def with_shots(benchmark: Benchmark, n_shots: int) -> Benchmark:
    """The first `n_shots` questions with their answers before each of the others. Raises ValueError for kinds without."""
    if benchmark.kind not in ("choice", "answer"):
        raise ValueError(f"--shots is about questions with answers; {benchmark.name} is of kind {benchmark.kind}")
    solved = [q.contexts[0] + q.continuations[q.gold] for q in benchmark.questions[:n_shots]]
    before = BETWEEN_SHOTS.join(solved) + BETWEEN_SHOTS
    asked = [
        Question(q.where, (before + q.contexts[0],), q.continuations, q.gold, q.lengths)
        for q in benchmark.questions[n_shots:]
    ]
    return Benchmark(benchmark.name, benchmark.kind, asked, n_shots)


def kind_of(row: Mapping[str, Any], where: str) -> Kind:
    """The kind that a row's fields tell. Raises ValueError that lists the fields."""
    for kind, names in SIGNS:
        if names <= row.keys():
            return kind
    known = "; ".join(f"{kind}: {', '.join(sorted(names))}" for kind, names in SIGNS)
    raise ValueError(
        f"{where}: no known benchmark row, it has {_fields(row)}; known are {known}; or name one by --kind"
    )


SIGNS: tuple[tuple[Kind, frozenset[str]], ...] = (
    ("pair", frozenset({"sentence_good", "sentence_bad"})),
    ("cloze", frozenset({"context_options", "continuation"})),
    ("cloze", frozenset({"sentence", "option1", "option2"})),
    ("choice", frozenset({"query", "choices"})),
    ("choice", frozenset({"question", "choices", "answerKey"})),
    ("choice", frozenset({"question_stem", "choices", "answerKey"})),
    ("choice", frozenset({"goal", "sol1", "sol2"})),
    ("choice", frozenset({"ctx", "endings"})),
    ("answer", frozenset({"context", "answer"})),
    ("answer", frozenset({"question", "answer"})),
    ("lastword", frozenset({"context", "continuation"})),
    ("lastword", frozenset({"text"})),
)


def _fields(row: object) -> str:
    return f"the fields {', '.join(map(str, row)) or 'none'}" if isinstance(row, Mapping) else repr(row)[:60]


# --- one reader a kind ---------------------------------------------------------------------------------------------


def _choice(row: Mapping[str, Any], where: str, asked: str) -> Question:
    query, choices, gold = _choices_of(row, where)
    context = asked.format(query.rstrip())
    texts = [str(choice) for choice in choices]
    if not 0 <= gold < len(texts):
        raise ValueError(f"{where}: gold is {gold}, but there are {len(texts)} choices")
    return Question(where, (context,), tuple(f" {text}" for text in texts), gold, tuple(map(len, texts)))


def _choices_of(row: Mapping[str, Any], where: str) -> tuple[str, Sequence[str], int]:
    """(query, choices, gold) of a row in any of the layouts."""
    if "goal" in row:
        return f"Question: {row['goal']}", (row["sol1"], row["sol2"]), int(row["label"])
    if "endings" in row:
        title = f"{row['activity_label']}: " if row.get("activity_label") else ""
        return title + row["ctx"], row["endings"], int(row["label"])
    if "answerKey" in row:
        labels, texts = row["choices"]["label"], row["choices"]["text"]
        if row["answerKey"] not in labels:
            raise ValueError(f"{where}: answerKey {row['answerKey']!r} is none of {', '.join(map(str, labels))}")
        query = row["question_stem"] if "question_stem" in row else f"Question: {row['question']}"
        return query, texts, labels.index(row["answerKey"])
    return row["query"], row["choices"], int(row["gold"])


def _cloze(row: Mapping[str, Any], where: str, asked: str) -> Question:
    if "context_options" in row:
        contexts, continuation, gold = tuple(row["context_options"]), row["continuation"], int(row["gold"])
    else:
        before, blank, after = row["sentence"].partition("_")
        if not blank:
            raise ValueError(f"{where}: the sentence has no blank _ to fill")
        contexts, continuation = (before + row["option1"], before + row["option2"]), after.strip()
        gold = int(row["answer"]) - 1
    if not 0 <= gold < len(contexts):
        raise ValueError(f"{where}: gold is {gold}, but there are {len(contexts)} contexts")
    return Question(where, contexts, (f" {continuation.lstrip()}",) * len(contexts), gold)


def _pair(row: Mapping[str, Any], where: str, asked: str) -> Question:
    # The harness puts a space before each, as before any choice, though nothing stands before it.
    pair = tuple(f" {str(row[name]).lstrip()}" for name in ("sentence_good", "sentence_bad"))
    return Question(where, ("",), pair, 0, (), row.get("UID"), row.get("linguistics_term"))


def _last_word(row: Mapping[str, Any], where: str, asked: str) -> Question:
    if "text" in row:
        context, _, word = row["text"].rpartition(" ")
    else:
        context, word = row["context"], row["continuation"].lstrip()
    if not word:
        raise ValueError(f"{where}: there is no word to predict")
    return Question(where, (context.rstrip(),), (f" {word}",), 0)


def _answer(row: Mapping[str, Any], where: str, asked: str) -> Question:
    context = row["context"] if "context" in row else row["question"]
    return Question(where, (asked.format(context.strip()),), (f" {row['answer']}",), 0)


READERS: dict[str, Callable[[Mapping[str, Any], str, str], Question]] = {
    "choice": _choice, "cloze": _cloze, "pair": _pair, "lastword": _last_word, "answer": _answer,
}  # fmt: skip
