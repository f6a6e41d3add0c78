"""Five tasks out of public data sets, for bench/real_checkpoint.py: how a row is asked, and how an answer is scored.

Every `*_rows` function gives (train, test) as rows that `graft sft` reads. Prompts are short on purpose: a CPU pays for each token.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from real_data import SPLIT_SEED, read_text, sms_rows

from graft.finetune.data.chat import split_answer
from graft.finetune.data.records import Record
from graft.finetune.evaluation.metrics import f1_scores, wilson_interval

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Task:
    """A task's rows, its scoring and what a run of it may cost."""

    rows: Callable[[Path], tuple[Rows, Rows]]  # of the folder of data sets
    score: Literal["label", "number", "text"]
    steps: int
    batch_size: int
    max_tokens: int  # longer rows are left out, in training and in testing
    n_test: int  # at most


def spam_rows(data: Path) -> tuple[Rows, Rows]:
    """sms_spam, split by unique text."""

    def asked(rows: Sequence[dict[str, str]]) -> Rows:
        return [{"prompt": f"Message: {row['prompt']}\nLabel:", "completion": f" {row['completion']}"} for row in rows]

    train, test = sms_rows(data)
    return asked(train), asked(test)


def sst2_rows(data: Path) -> tuple[Rows, Rows]:
    """SST-2: the training file's phrases, each once, and whole sentences of the test file."""

    def asked(file: str) -> Rows:
        lines = [line for line in read_text(data / "sst2" / file).split("\n")[1:] if line.strip()]
        pairs = dict(line.rsplit("\t", 1) for line in lines)
        names = {"1": " positive", "0": " negative"}
        return [
            {"prompt": f"Review: {text.strip()}\nSentiment:", "completion": names[label.strip()]}
            for text, label in pairs.items()
        ]

    return asked("train.tsv.gz"), asked("test.tsv")


def gsm8k_rows(data: Path) -> tuple[Rows, Rows]:
    """Grade-school mathematics; the calculator's annotations (<<1+1=2>>) are taken out, the last line is #### number."""

    def asked(file: str) -> Rows:
        rows = [json.loads(line) for line in read_text(data / "gsm8k" / file).splitlines()]
        return [
            {
                "prompt": f"Question: {row['question']}\nAnswer:",
                "completion": " " + re.sub(r"<<.*?>>", "", row["answer"]),
            }
            for row in rows
        ]

    return asked("train.jsonl.gz"), asked("test.jsonl.gz")


def instruction_rows(data: Path) -> tuple[Rows, Rows]:
    """1,100 short instructions as conversations, through the checkpoint's chat template; no instruction on both sides."""
    rows = json.loads(read_text(data / "llms_from_scratch/instruction-data.json"))
    pairs = {f"{row['instruction']}\n{row['input']}".strip(): row["output"] for row in rows}
    made = [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}
        for asked, answer in pairs.items()
    ]
    return made[len(made) // 10 :], made[: len(made) // 10]


def translation_rows(data: Path) -> tuple[Rows, Rows]:
    """multi30k, English to German; the test of 2016."""

    def asked(name: str) -> Rows:
        english, german = (read_text(data / f"multi30k/{name}.{lang}.gz").splitlines() for lang in ("en", "de"))
        return [
            {"prompt": f"English: {source}\nGerman:", "completion": f" {target}"}
            for source, target in zip(english, german, strict=True)
        ]

    return asked("train"), asked("test_2016_flickr")


TASKS = {
    "spam": Task(spam_rows, "label", steps=160, batch_size=8, max_tokens=80, n_test=1100),
    "sst2": Task(sst2_rows, "label", steps=100, batch_size=16, max_tokens=48, n_test=400),
    "multi30k": Task(translation_rows, "text", steps=100, batch_size=8, max_tokens=64, n_test=100),
    "instructions": Task(instruction_rows, "text", steps=60, batch_size=8, max_tokens=112, n_test=60),
    "gsm8k": Task(gsm8k_rows, "number", steps=60, batch_size=4, max_tokens=160, n_test=60),
}


def drawn(rows: Rows, n: int) -> Rows:
    """At most n of the rows, the same ones each time, in a random order that is the same too."""
    order = np.random.default_rng(SPLIT_SEED).permutation(len(rows))
    return [rows[i] for i in order[:n]]


def scores(task: Task, test: Sequence[Record], written: Sequence[str]) -> dict[str, Any]:
    """The task's figures for the answers that were written, stripped."""
    truth = [split_answer(record)[1].strip() for record in test]
    if task.score == "label":
        n_right = sum(a == b for a, b in zip(truth, written, strict=True))
        per_label = {f"f1_{label}": value for label, value in f1_scores(truth, written).items()}
        return share("accuracy", n_right, len(truth)) | per_label
    if task.score == "number":
        formed = [re.search(r"#### (-?[\d.,]+)$", answer) for answer in written]
        n_right = sum(
            bool(match) and number(match.group(1)) == number(right.rpartition("#### ")[2])
            for match, right in zip(formed, truth, strict=True)
        )
        return share("accuracy", n_right, len(truth)) | share("format", sum(map(bool, formed)), len(truth))
    import sacrebleu

    return {
        "chrf": sacrebleu.corpus_chrf(list(written), [truth]).score,
        "bleu": sacrebleu.corpus_bleu(list(written), [truth]).score,
    }


def share(name: str, n_right: int, n: int) -> dict[str, float]:
    """A share of n with its 95% interval."""
    low, high = wilson_interval(n_right, n)
    return {name: n_right / n, f"{name}_low": low, f"{name}_high": high}


def number(text: str) -> str:
    """1,000. and 1000 are the same answer."""
    return text.replace(",", "").rstrip(".")
