"""The demo's figures: each adapter against what needs no model and against the base, and how fast a swap is."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...base.model.transformer import Transformer
from ...base.tokenizer.tokenizer import Tokenizer
from ..adapters.bank import AdapterBank
from ..adapters.files import stored_bytes
from ..baselines import NaiveBayes, majority_label
from ..data.chat import split_answer
from ..data.records import Record, read_records
from ..evaluation.answers import write_answers
from ..evaluation.labels import most_likely
from ..evaluation.metrics import wilson_interval
from ..evaluation.options import MAX_LABELS
from ..generate import generate
from ..loading import load_model

N_WRONG = 2  # mistakes of each adapter that the report shows
SAMPLED = ("Return the", "def ")  # what the base goes on from


@dataclass(frozen=True)
class TaskResult:
    """One row of the adapters' table."""

    name: str
    n: int  # held-out records, of combinations that no training record has
    majority: float | None  # share right of the commonest answer of training; None: answers are free text
    bag_of_words: float | None  # of naive Bayes over the prompts' words
    base_accuracy: float  # exact matches, the base alone, which never saw the format
    base_likelihood: float | None  # the base alone, its most probable one of the answers
    n_correct: int  # exact matches with the adapter
    low: float  # 95% interval of its share
    high: float
    adapter_bytes: int  # on disk
    wrong: list[dict[str, str]]  # the adapter's first mistakes

    @property
    def accuracy(self) -> float:
        return self.n_correct / self.n


def use_adapters(out: Path, names: Sequence[str], device: str, tokenizer: Tokenizer, *, seed: int) -> dict[str, Any]:
    """The report's part about one base in memory and its adapters, from the folders that training left in `out`."""
    model = load_model(out / "base", device=device)
    sampled = generate(model, tokenizer, SAMPLED, max_new_tokens=40, temperature=0.8, top_p=0.95, seed=seed)
    bank = AdapterBank(model)
    for name in names:
        bank.load(name, out / f"adapters/{name}")
    held_out = {name: read_records(out / f"data/{name}/eval.jsonl") for name in names}
    tasks = [_score(bank, tokenizer, name, held_out[name], out) for name in names]
    return {
        "tasks": [{**vars(task), "accuracy": task.accuracy} for task in tasks],
        "samples": [{"prompt": prompt, "text": text} for prompt, text in zip(SAMPLED, sampled, strict=True)],
        "first_token_ms": first_token_ms(bank, tokenizer),
        "mixed_batch": _mixed_batch(model, tokenizer, held_out),
    }


def _score(bank: AdapterBank, tokenizer: Tokenizer, name: str, records: list[Record], out: Path) -> TaskResult:
    """One task: what needs no model (where its answers are few), the base alone, the adapter."""
    model, truth = bank.model, [_answer(record) for record in records]
    train = read_records(out / f"data/{name}/train.jsonl")
    labels = [_answer(record) for record in train]
    majority = words = likelihood = None
    bank.use(None)
    alone = _share(truth, write_answers(model, tokenizer, records, None, batch_size=50))
    if len(set(labels)) <= MAX_LABELS:
        majority = _share(truth, [majority_label(labels)] * len(truth))
        counted = NaiveBayes([prompt_text(record) for record in train], labels)
        words = _share(truth, [counted.predict(prompt_text(record)) for record in records])
        likelihood = _share(truth, most_likely(model, tokenizer, records, None))
    bank.use(name)
    written = write_answers(model, tokenizer, records, None, batch_size=50)
    n_correct = sum(a == b for a, b in zip(truth, written, strict=True))
    low, high = wilson_interval(n_correct, len(records))
    wrong = [
        _row(name, record, answer) for record, answer in zip(records, written, strict=True) if answer != _answer(record)
    ]
    n_bytes = stored_bytes(out / f"adapters/{name}")
    return TaskResult(
        name, len(records), majority, words, alone, likelihood, n_correct, low, high, n_bytes, wrong[:N_WRONG]
    )


def _answer(record: Record) -> str:
    return split_answer(record)[1].strip()


def prompt_text(record: Record) -> str:
    """What stands before the answer, as a reader sees it: "user: what does len do?", a turn a line."""
    prompt, _ = split_answer(record)
    return prompt if isinstance(prompt, str) else "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)


def _row(name: str, record: Record, answer: str) -> dict[str, str]:
    return {"adapter": name, "prompt": prompt_text(record), "answer": answer, "expected": _answer(record)}


def _share(truth: list[str], predicted: list[str]) -> float:
    return sum(a == b for a, b in zip(truth, predicted, strict=True)) / len(truth)


def first_token_ms(bank: AdapterBank, tokenizer: Tokenizer, n: int = 60) -> dict[str, float]:
    """Milliseconds to the first new token of one short prompt, medians: right after a swap, and without one.

    In turn, so that both see the same machine. With a swap the adapter that acts changes each time.
    """
    prompt, names = "Message: you won. please send your key.\nLabel:", [*bank.names, None]
    times: dict[str, list[float]] = {"after_swap": [], "no_swap": []}
    for i in range(n):
        for kind, found in times.items():
            began = time.perf_counter()
            if kind == "after_swap":
                bank.use(names[i % len(names)])
            generate(bank.model, tokenizer, [prompt], max_new_tokens=1)
            found.append(1000 * (time.perf_counter() - began))
    return {kind: statistics.median(found) for kind, found in times.items()}


def _mixed_batch(model: Transformer, tokenizer: Tokenizer, held_out: dict[str, list[Record]]) -> list[dict[str, str]]:
    """One batch, a different adapter in each row."""
    rows = [(name, records[i]) for i in range(2) for name, records in held_out.items()]
    names = [name for name, _ in rows]
    written = write_answers(model, tokenizer, [record for _, record in rows], None, adapters=names)
    return [_row(name, record, answer) for (name, record), answer in zip(rows, written, strict=True)]
