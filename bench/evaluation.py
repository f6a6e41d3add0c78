"""graft eval beside lm-evaluation-harness on the same rows: figures and processor time.

    python bench/evaluation.py BASE FOLDER --limit 200

BASE: a checkpoint; FOLDER: arc_easy.jsonl.gz, piqa.jsonl.gz, lambada_openai.jsonl.gz and blimp.zip. Three runs a task: graft
eval; the harness with graft's model class; the harness with its own (transformers). The figures must be equal.
"""

import argparse
import json
import logging
import time
from pathlib import Path
from typing import Any

import datasets
import torch
from lm_eval.api.task import ConfigurableTask
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM

from graft.base.runlog import versions
from graft.finetune.evaluation.benchmarks import score_benchmark
from graft.finetune.evaluation.files import rows_of
from graft.finetune.evaluation.lm_eval_model import GraftLM
from graft.finetune.evaluation.tasks import read_benchmark

CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{query.strip()}}\nAnswer:",
    "doc_to_target": "{{gold}}",
    "doc_to_choice": "{{choices}}",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}
PAIR = {
    "output_type": "multiple_choice",
    "doc_to_text": "",
    "doc_to_target": 0,
    "doc_to_choice": "{{[sentence_good, sentence_bad]}}",
    "metric_list": [{"metric": "acc"}],
}
LAST_WORD = {
    "output_type": "loglikelihood",
    "doc_to_text": "{{context}}",
    "doc_to_target": "{{' ' + continuation}}",
    "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
}
TASKS = {  # file, the harness's task, the figures that must agree
    "arc_easy": ("arc_easy.jsonl.gz", CHOICE, ("acc", "acc_norm")),
    "piqa": ("piqa.jsonl.gz", CHOICE, ("acc", "acc_norm")),
    "lambada": ("lambada_openai.jsonl.gz", LAST_WORD, ("acc", "perplexity")),
    "blimp": ("blimp.zip", PAIR, ("acc",)),
}


def by_harness(model: Any, name: str, asked: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    config = {"task": name, "dataset_path": "", "test_split": "test", "num_fewshot": 0, **asked}
    config["custom_dataset"] = lambda **_: {"test": datasets.Dataset.from_list(rows)}
    found = simple_evaluate(model=model, tasks=[ConfigurableTask(config=config)], bootstrap_iters=0)
    return {key.partition(",")[0]: value for key, value in found["results"][name].items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--peer", nargs="*", default=list(TASKS), help="tasks that the harness's own class scores too")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    ours = GraftLM(str(arguments.base), device="cpu")
    theirs = HFLM(pretrained=str(arguments.base), device="cpu", dtype="float32", batch_size=16)
    print(", ".join(f"{name} {version}" for name, version in versions().items()))
    for name in arguments.tasks:
        file, asked, metrics = TASKS[name]
        # Of the many files of a zip the first rows are one paradigm: every so many-th row is of all.
        every = 67_000 // arguments.limit if name == "blimp" else 1
        rows = [row for i, (_, row) in enumerate(rows_of(arguments.folder / file)) if i % every == 0][: arguments.limit]
        benchmark = read_benchmark(arguments.folder / file, name=name)
        questions = [q for i, q in enumerate(benchmark.questions) if i % every == 0][: arguments.limit]
        benchmark = type(benchmark)(name, benchmark.kind, questions)
        runs = {
            "graft eval": lambda one=benchmark: score_benchmark(ours.model, ours._tokenizer, one),
            "harness, graft": lambda name=name, asked=asked, rows=rows: by_harness(ours, name, asked, rows),
            "harness, hf": lambda name=name, asked=asked, rows=rows: by_harness(theirs, name, asked, rows),
        }
        if name not in arguments.peer:
            del runs["harness, hf"]
        found = {}
        for label, run in runs.items():
            began = time.process_time()
            figures = run()
            found[label] = {metric: figures[metric] for metric in metrics}
            print(
                f"{name:9} {label:15} n {len(rows)} {json.dumps(found[label])} {time.process_time() - began:.0f} s",
                flush=True,
            )
        same = all(
            abs(one[m] - found["graft eval"][m]) <= 1e-4 * abs(one[m]) for one in found.values() for m in metrics
        )
        print(f"{name:9} {'equal' if same else 'NOT EQUAL'}", flush=True)


if __name__ == "__main__":
    main()
