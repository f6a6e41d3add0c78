"""A real checkpoint through graft, five tasks by four methods: `python bench/real_checkpoint.py --base DIR --data DIR`.

    same      logits and greedy tokens beside transformers', and what the checkpoint answers to a question
    TASK      spam, sst2, multi30k, instructions, gsm8k (real_tasks.py): the bare base, LoRA, QLoRA and full fine-tuning

Each cell (a task by a method) is a JSON file in OUT and is not run again while that file is there, so that a stopped
bench goes on; the last thing printed is the table of what is there. A label task scores the bare base by the likelihood of
the labels, since a base that never saw the format need not write it; everything else is what the model writes, greedily.
Memory is of one step at the task's batch and longest row: predicted without memory, and measured on the allocator.
Processor time is of a step, the median of the run's.
"""

import argparse
import datetime
import json
import math
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from real_data_table import hardware
from real_tasks import TASKS, Rows, Task, drawn, scores

from graft.base.checkpoint import write_file, write_json
from graft.base.evaluate import mean_loss
from graft.base.generate.sampling import Sampling
from graft.base.json_fields import read_json
from graft.base.model.huggingface import load_config
from graft.base.model.transformer import Transformer
from graft.base.runlog import versions
from graft.base.tokenizer.tokenizer import Tokenizer
from graft.finetune import sft
from graft.finetune.adapters.bank import AdapterBank
from graft.finetune.adapters.files import stored_bytes
from graft.finetune.adapters.lora import LoraConfig
from graft.finetune.data.chat import encode_prompt, encode_whole
from graft.finetune.data.packing import collate_padded
from graft.finetune.data.records import Record, to_record
from graft.finetune.evaluation.answers import write_answers
from graft.finetune.evaluation.labels import most_likely
from graft.finetune.evaluation.options import EvalOptions
from graft.finetune.generate import generate_answers
from graft.finetune.loading import load_model
from graft.finetune.memory.measure import measure
from graft.finetune.memory.settings import MemorySettings

ROOT = Path(__file__).resolve().parent.parent
METHODS = ("base", "lora", "qlora", "full")
LORA = LoraConfig(rank=16, alpha=32.0)
RATES = {"lora": 5e-4, "qlora": 5e-4, "full": 5e-5}  # graft's defaults; none was tuned on these tests
QUESTIONS = ("What is the capital of France?", "Name three colours.", "Write one sentence about the sea.")


def prepared(base: Path, data: Path, out: Path, name: str) -> tuple[Path, list[Record], dict[str, int]]:
    """(file of training rows, test records, counts): rows of at most the task's length, as many as its steps read."""
    task, tokenizer = TASKS[name], Tokenizer.load(base)
    folder = out / name
    kept: list[Rows] = []
    counts: dict[str, int] = {}
    wanted = (task.steps * task.batch_size, task.n_test)
    for split, rows, n in zip(("train", "test"), task.rows(data), wanted, strict=True):
        chosen = drawn(rows, 2 * n)
        short = [
            row for row in chosen if len(encode_whole(to_record(row, split), tokenizer).ids) <= task.max_tokens + 1
        ]
        counts[f"n_{split}"], counts[f"n_{split}_too_long"] = len(short[:n]), len(chosen) - len(short)
        kept.append(short[:n])
    write_file(folder / "train.jsonl", "".join(json.dumps(row) + "\n" for row in kept[0]))
    return folder / "train.jsonl", [to_record(row, f"{name} test row {i}") for i, row in enumerate(kept[1], 1)], counts


@contextmanager
def processor_times() -> Iterator[list[float]]:
    """Yields a list that gets the processor seconds of each step of the runs within the block, the first step left out."""
    seconds: list[float] = []

    @contextmanager
    def recorder(label: str, total: int, *, shown: bool = True) -> Iterator[Callable[[dict[str, Any]], None]]:
        last: list[float] = []

        def observe(line: dict[str, Any]) -> None:
            now = time.process_time()
            if last:
                seconds.append(now - last[-1])
            last.append(now)
            if line["step"] % 20 == 0 or line["step"] == total:
                print(f"  {label}: step {line['step']} of {total}, loss {line['loss']:.3f}", flush=True)

        yield observe

    with patch.object(sft, "step_progress", recorder):
        yield seconds


def trained(base: Path, file: Path, out: Path, task: Task, method: str, seed: int) -> dict[str, Any]:
    """Fine-tune into `out`; what it cost."""
    with processor_times() as seconds:
        summary = sft.run_sft(
            base=base, data=file, out=out, method=method, lora=LORA,
            settings={
                "batch_size": task.batch_size, "learning_rate": RATES[method], "steps": task.steps, "seed": seed,
                "warmup_steps": 5, "checkpoint_every": 0,
            },
            force=True, progress=False, label=f"{file.parent.name} {method}",
        )  # fmt: skip
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    settings = MemorySettings(
        method=method, batch_size=task.batch_size, seq_len=task.max_tokens, dtype="float32", rank=LORA.rank,
        checkpointing=False,
    )  # fmt: skip
    memory = measure(load_config(base), settings, device="cpu")
    return {
        "steps": task.steps,
        "batch_size": task.batch_size,
        "train_loss": summary["train_loss"],
        "n_trained_params": summary["n_trained_params"],
        "stored_bytes": (out / "model.safetensors").stat().st_size if method == "full" else stored_bytes(out),
        "predicted_peak_bytes": memory.predicted.peak_bytes,
        "measured_peak_bytes": memory.measured_bytes,
        "processor_s_per_step": statistics.median(seconds) if seconds else None,
    }


def scored(model: Transformer, tokenizer: Tokenizer, task: Task, test: Sequence[Record], method: str) -> dict[str, Any]:
    """The figures of a model on the test rows."""
    if task.score == "label" and method == "base":
        written = most_likely(model, tokenizer, test, None, options=EvalOptions(score="likelihood"))
        return {"scored_by": "likelihood", **scores(task, test, written)}
    written = write_answers(model, tokenizer, test, None, batch_size=32)
    figures = {"scored_by": "what it writes", **scores(task, test, written)}
    if task.score != "label":
        encoded = [encode_whole(record, tokenizer) for record in test]
        figures["loss"] = mean_loss(model, [collate_padded(encoded[i : i + 8]) for i in range(0, len(encoded), 8)])
    return figures | {"first_answers": written[:3]}


def cell(base: Path, data: Path, out: Path, name: str, method: str, seed: int) -> dict[str, Any]:
    """One task by one method, trained and scored."""
    task = TASKS[name]
    file, test, counts = prepared(base, data, out, name)
    folder = out / name / method
    figures: dict[str, Any] = {"task": name, "method": method, "seed": seed, **counts}
    if method != "base":
        figures |= trained(base, file, folder, task, method, seed)
    source = folder if method == "full" else base
    model = load_model(source, quantize="nf4" if method == "qlora" else None)
    if method in ("lora", "qlora"):
        bank = AdapterBank(model)
        bank.load(name, folder)
        bank.use(name)
    began = time.process_time()
    figures |= scored(model, Tokenizer.load(source), task, test, method)
    figures["scoring_processor_s"] = round(time.process_time() - began, 1)
    if method == "full":
        (folder / "model.safetensors").unlink()  # half a gigabyte that nothing reads again
    return figures


@torch.no_grad()
def same_as_transformers(base: Path, n_new: int = 32) -> dict[str, Any]:
    """Logits, greedy tokens and rendered conversations beside transformers', and the answers."""
    import transformers

    model, tokenizer = load_model(base), Tokenizer.load(base)
    peer: Any = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    peer_tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    gap, largest, n_same, n_tokens, same_prompts, answers = 0.0, 0.0, 0, 0, True, {}
    for question in QUESTIONS:
        turns: Any = [{"role": "user", "content": question}]
        ids = encode_prompt(turns, tokenizer).tolist()
        same_prompts &= ids == peer_tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
        batch = torch.tensor([ids])
        theirs = peer(batch).logits
        gap = max(gap, float((model(batch) - theirs).abs().max()))
        largest = max(largest, float(theirs.abs().max()))
        answer = generate_answers(model, tokenizer, [ids], Sampling(max_new_tokens=n_new))[0]
        new = peer.generate(batch, attention_mask=torch.ones_like(batch), max_new_tokens=n_new, do_sample=False)
        expected = [i for i in new[0, len(ids) :].tolist() if i not in (peer_tokenizer.eos_token_id,)]
        n_tokens += len(expected)
        n_same += sum(a == b for a, b in zip(answer.ids, expected, strict=False))
        answers[question] = answer.text
    return {
        "n_params": sum(p.numel() for p in model.parameters()),
        "largest_logit_gap": gap,
        "largest_logit": largest,
        "prompts_equal": same_prompts,
        "greedy_tokens_equal": n_same,
        "greedy_tokens": n_tokens,
        "answers": answers,
    }


def metric(figures: dict[str, Any]) -> str:
    """A cell's result in a few words."""
    name, n = figures["task"], figures["n_test"]
    if name == "spam":
        half = 100 * (figures["accuracy_high"] - figures["accuracy_low"]) / 2
        return f"F1 {figures['f1_spam']:.3f}, {figures['accuracy']:.1%} (± {half:.1f}, n = {n:,})"
    if name == "sst2":
        half = 100 * (figures["accuracy_high"] - figures["accuracy_low"]) / 2
        return f"{figures['accuracy']:.1%} (± {half:.1f}, n = {n:,})"
    if name == "gsm8k":
        return f"form {figures['format']:.0%}, right {figures['accuracy']:.1%}, loss {figures['loss']:.3f} (n = {n})"
    return f"chrF {figures['chrf']:.1f}, BLEU {figures['bleu']:.1f}, loss {figures['loss']:.3f} (n = {n})"


def table(cells: Sequence[dict[str, Any]]) -> str:
    """Markdown, a line a cell."""
    lines = [
        "| task | method | held-out | stored MB | step's peak MiB, predicted / measured | processor s a step |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for one in cells:
        cost = ("", "", "")
        if one["method"] != "base":
            cost = (
                f"{one['stored_bytes'] / 1e6:.1f}",
                f"{one['predicted_peak_bytes'] / 2**20:,.0f} / {one['measured_peak_bytes'] / 2**20:,.0f}",
                f"{one['processor_s_per_step'] or math.nan:.2f}",
            )
        lines.append(f"| {one['task']} | {one['method']} | {metric(one)} | {' | '.join(cost)} |")
    return "\n".join(lines)


def main() -> None:
    """Run the cells that are asked for and not there yet, then print what is known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--data", type=Path, default=ROOT / "../shared/data", help="folder of the data sets")
    parser.add_argument("--out", type=Path, default=Path("runs/real_checkpoint"))
    parser.add_argument("--tasks", default=",".join(["same", *TASKS]), help="in this order; comma-separated")
    parser.add_argument("--methods", default=",".join(METHODS), help=f"of {', '.join(METHODS)}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", type=Path, help="write the figures with versions and hardware here")
    args = parser.parse_args()
    for name in args.tasks.split(","):
        if name not in ("same", *TASKS):
            parser.error(f"unknown task {name!r}; choose same, {', '.join(TASKS)}")
        for method in ["all"] if name == "same" else args.methods.split(","):
            kept = args.out / f"{name}-{method}.json"
            if kept.exists():
                continue
            print(f"{datetime.datetime.now():%H:%M} {name} {method}", flush=True)
            if name == "same":
                write_json(kept, same_as_transformers(args.base))
            else:
                write_json(kept, cell(args.base, args.data, args.out, name, method, args.seed))
    files = [args.out / f"{name}-{method}.json" for name in TASKS for method in METHODS]
    cells = [read_json(file) for file in files if file.exists()]
    same = args.out / "same-all.json"
    if args.save:
        about = {"date": f"{datetime.date.today()}", "hardware": hardware(), "versions": versions()}
        write_json(args.save, {"about": about, "same": read_json(same) if same.exists() else None, "cells": cells})
    if same.exists():
        print(json.dumps(read_json(same), indent=1))
    print(table(cells))


if __name__ == "__main__":
    main()
