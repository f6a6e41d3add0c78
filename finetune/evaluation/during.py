"""Benchmarks while a base pretrains: BLiMP, LAMBADA and others as figures of each evaluation."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from ...base.model.transformer import Transformer
from ...base.tokenizer.tokenizer import Tokenizer
from .benchmarks import check_fits, named_tasks, score_benchmark
from .tasks import Benchmark, read_benchmark


def open_benchmarks(
    tasks: Sequence[str], n_questions: int, tokenizer: Tokenizer, max_seq_len: int
) -> Callable[[Transformer, Tokenizer], dict[str, float]]:
    """Read NAME=FILE before the run; what is returned scores a model: val_NAME_acc, and val_NAME_perplexity of last words.

    Of a longer file `n_questions` are asked, evenly spread over it, so that each of BLiMP's paradigms has some. Raises
    ValueError or OSError for files that can't be read, and for questions longer than the model reads.
    """
    named = named_tasks(tasks, flag="benchmarks")
    benchmarks = [spread(read_benchmark(file, name=name), n_questions) for name, file in named]
    for benchmark in benchmarks:
        check_fits(benchmark, tokenizer, max_seq_len)

    def score(model: Transformer, tokenizer: Tokenizer) -> dict[str, float]:
        found = {}
        for benchmark in benchmarks:
            figures = score_benchmark(model, tokenizer, benchmark)
            for key in ("acc", "perplexity"):
                if key in figures:
                    found[f"val_{benchmark.name}_{key}"] = float(figures[key])
        return found

    return score


def spread(benchmark: Benchmark, n: int) -> Benchmark:
    """At most n of the questions, evenly over the file."""
    questions = benchmark.questions
    if len(questions) <= n:
        return benchmark
    return replace(benchmark, questions=[questions[i * len(questions) // n] for i in range(n)])
