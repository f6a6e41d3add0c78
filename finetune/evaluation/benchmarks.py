"""Benchmarks -> figures: a base and its adapters on several of them in one process."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...base.device import resolve_device
from ...base.generate.sampling import Sampling
from ...base.model.transformer import Transformer
from ...base.tokenizer.tokenizer import Tokenizer
from ..data.chat import encode_prompt
from ..data.records import join_errors
from ..generate import generate_answers, start_ids
from .likelihood import Likelihood, Progress, Row, cut_to, encode_pair, score_groups
from .metrics import mean_interval, share
from .run import check_request, each_in_turn, load_bank
from .tasks import Benchmark, Question, read_benchmark

ANSWER_TOKENS = 64  # that a written answer may take
ANSWER_ENDS = ("Question:",)  # a base goes on with a question of its own


def run_benchmarks(
    base: Path | str,
    tasks: Sequence[str | Path],  # NAME=FILE or FILE
    adapters: Mapping[str, Path | str] | None = None,
    *,
    with_base: bool = True,
    kind: str | None = None,
    limit: int | None = None,  # questions of each task, the first ones
    n_shots: int = 0,
    dtype: str = "float32",
    device: str = "auto",
    progress: Progress | None = None,
) -> dict[str, dict[str, dict[str, Any]]]:
    """{adapter: {task: figures}}, the bare base first under `base`. The files are read before the weights.

    Raises ValueError or OSError for bad input, with every bad row of a file in one message.
    """
    adapters = adapters or {}
    check_request(adapters, with_base=with_base, limit=limit)
    benchmarks = [
        read_benchmark(file, name=name, kind=kind, limit=limit, n_shots=n_shots) for name, file in named_tasks(tasks)
    ]
    bank, tokenizer = load_bank(base, adapters, dtype=dtype, device=resolve_device(device))
    return {
        name: {one.name: score_benchmark(bank.model, tokenizer, one, progress=progress) for one in benchmarks}
        for name in each_in_turn(bank, adapters, with_base=with_base)
    }


def named_tasks(tasks: Sequence[str | Path], *, flag: str = "--task") -> list[tuple[str, Path]]:
    """['arc_easy=a.jsonl.gz', 'b.zip'] -> names and files. Raises ValueError for none, and for a name that comes twice."""
    found: dict[str, Path] = {}
    for task in tasks:
        name, equals, file = str(task).partition("=")
        if not equals or Path(str(task)).exists():
            name, file = Path(str(task)).name.partition(".")[0], str(task)
        if not name or not file or name in found:
            wrong = f"the name {name!r} is given twice" if name and file else "the name or the file is empty"
            raise ValueError(f"{flag} {task}: {wrong}; write NAME=FILE")
        found[name] = Path(file)
    if not found:
        raise ValueError(f"no task given; write {flag} arc_easy=FILE")
    return list(found.items())


def score_benchmark(
    model: Transformer, tokenizer: Tokenizer, benchmark: Benchmark, *, progress: Progress | None = None
) -> dict[str, Any]:
    """One benchmark's figures with the adapter that acts: n, and each share with its 95% interval.

    acc: the right continuation has the largest log-probability. acc_norm: per character of the choice (without the space
    before it), as lm-evaluation-harness's. Of equals the first counts, in both.
    """
    figures: dict[str, Any] = {"kind": benchmark.kind, "n": len(benchmark.questions)}
    if benchmark.n_shots:
        figures["n_shots"] = benchmark.n_shots
    if benchmark.kind == "answer":
        return figures | _written(model, tokenizer, benchmark.questions, progress)
    scored, n_cut = _scored(model, tokenizer, benchmark.questions, progress)
    if n_cut:
        figures["n_cut"] = n_cut
    if benchmark.kind == "lastword":
        return figures | _last_words([row[0] for row in scored])
    return figures | choice_figures(benchmark.questions, scored)


def check_fits(benchmark: Benchmark, tokenizer: Tokenizer, max_seq_len: int) -> None:
    """Raise ValueError, naming the rows, for questions that a model of this length can't be asked."""
    if benchmark.kind == "answer":
        _prompts(tokenizer, benchmark.questions, max_seq_len)
    else:
        _encoded(tokenizer, benchmark.questions, max_seq_len)


def _scored(
    model: Transformer, tokenizer: Tokenizer, questions: Sequence[Question], progress: Progress | None
) -> tuple[list[list[Likelihood]], int]:
    """Each continuation's likelihood, and how many contexts are longer than the model and lost their beginning."""
    groups, n_cut = _encoded(tokenizer, questions, model.config.max_seq_len)
    return score_groups(model, groups, progress=progress), n_cut


def _encoded(tokenizer: Tokenizer, questions: Sequence[Question], max_seq_len: int) -> tuple[list[list[Row]], int]:
    """Each question's (context, continuation) ids, and how many contexts lost their beginning."""
    groups, bad, n_cut = [], [], 0
    for question in questions:
        contexts = question.contexts * (len(question.continuations) // len(question.contexts))
        try:
            rows = [encode_pair(tokenizer, *pair) for pair in zip(contexts, question.continuations, strict=True)]
            cut = [cut_to(row, max_seq_len) for row in rows]
        except ValueError as error:
            bad.append(f"{question.where}: {error}")
            continue
        n_cut += cut != rows
        groups.append(cut)
    if bad:
        raise ValueError(join_errors(bad))
    return groups, n_cut


def choice_figures(questions: Sequence[Question], scored: Sequence[Sequence[Likelihood]]) -> dict[str, Any]:
    """acc, acc_norm where the choices differ, the share that guessing gets right, and BLiMP's parts."""
    right = [_best([one.log_p for one in row]) == q.gold for q, row in zip(questions, scored, strict=True)]
    figures: dict[str, Any] = share("acc", right)
    if all(question.lengths for question in questions):
        normed = [
            _best([one.log_p / max(1, n) for one, n in zip(row, q.lengths, strict=True)]) == q.gold
            for q, row in zip(questions, scored, strict=True)
        ]
        figures |= share("acc_norm", normed)
    figures["chance"] = sum(1 / len(question.continuations) for question in questions) / len(questions)
    for name, label in (("families", "family"), ("parts", "part")):
        groups: dict[str, list[bool]] = defaultdict(list)
        for question, ok in zip(questions, right, strict=True):
            if (group := getattr(question, label)) is not None:
                groups[group].append(ok)
        if groups:
            figures[name] = {group: {"n": len(oks), **share("acc", oks)} for group, oks in sorted(groups.items())}
    if "parts" in figures:
        figures["acc_mean_of_parts"] = sum(part["acc"] for part in figures["parts"].values()) / len(figures["parts"])
    return figures


def _best(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def _last_words(scored: Sequence[Likelihood]) -> dict[str, Any]:
    """Share of words that greedy decoding gives, and exp of minus the mean log-probability of a word."""
    mean, low, high = mean_interval([one.log_p for one in scored])
    ends = {"perplexity": -mean, "perplexity_low": -high, "perplexity_high": -low}
    return {**share("acc", [one.greedy for one in scored]), **{k: math.exp(min(v, 700)) for k, v in ends.items()}}


def _written(
    model: Transformer, tokenizer: Tokenizer, questions: Sequence[Question], progress: Progress | None
) -> dict[str, Any]:
    """Share of greedy answers whose last number is the right one. Raises ValueError for questions without room."""
    from ..align.rewards import find_reward

    number = find_reward("number")
    ids = _prompts(tokenizer, questions, model.config.max_seq_len)
    right = [False] * len(questions)
    order = sorted(range(len(questions)), key=lambda i: len(ids[i]))
    for start in range(0, len(order), 16):
        rows = order[start : start + 16]
        sampling = Sampling(max_new_tokens=ANSWER_TOKENS)
        answers = generate_answers(model, tokenizer, [ids[i] for i in rows], sampling, stop=ANSWER_ENDS)
        for i, answer in zip(rows, answers, strict=True):
            right[i] = number("", answer.text, {"answer": questions[i].continuations[0]}) == 1
        if progress is not None:
            progress(start + len(rows), len(order))
    return share("acc", right)


def _prompts(tokenizer: Tokenizer, questions: Sequence[Question], max_seq_len: int) -> list[list[int]]:
    """The ids that each answer begins after. Raises ValueError for questions without room."""
    ids = [start_ids(encode_prompt(q.contexts[0], tokenizer).tolist(), tokenizer) for q in questions]
    if bad := [q.where for q, one in zip(questions, ids, strict=True) if len(one) + ANSWER_TOKENS > max_seq_len]:
        raise ValueError(
            join_errors(
                [f"{where}: no room for {ANSWER_TOKENS} new tokens; the model reads {max_seq_len}" for where in bad]
            )
        )
    return ids
