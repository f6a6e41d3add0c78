"""graft on public data, from raw text to quantized adapters, on two CPU cores: `python bench/real_data.py --data DIR`.

Stages, each kept in OUT and skipped when it is there (`--stages base,sms`; `--fresh` runs them again):

    base      a tokenizer and a small base on TinyStories; validation loss and bits a byte beside a bigram model's
    sms       spam detection (sms_spam, split by unique text): LoRA, full fine-tuning and QLoRA on that base
    sst2      sentiment (SST-2): the same three, paired by seed
    quality   the base's weights in float32, bf16, NF4, NF4 + DQ, FP4 and Int4, as QLoRA's Table 2

DIR is a folder with tinystories/, sms_spam/ and sst2/; nothing of it is copied out of OUT. The last thing printed is the
table; bench/results/real_data.json keeps the figures with versions and date, docs/results.md the table.
"""

import argparse
import copy
import datetime
import gzip
import json
import math
import re
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from real_data_table import hardware, markdown

from graft.base.checkpoint import write_file, write_json
from graft.base.data.batches import evaluation_batches
from graft.base.data.shards import open_tokens, prepare
from graft.base.evaluate import bigram_loss, bits_per_byte, mean_loss
from graft.base.json_fields import read_json
from graft.base.plots import plot_run
from graft.base.pretrain import run_pretrain
from graft.base.runlog import versions
from graft.base.tokenizer.tokenizer import Tokenizer
from graft.finetune.adapters.bank import AdapterBank
from graft.finetune.adapters.files import stored_bytes
from graft.finetune.adapters.lora import LoraConfig
from graft.finetune.data.records import Record, to_record
from graft.finetune.evaluation.answers import write_answers
from graft.finetune.evaluation.metrics import f1_scores
from graft.finetune.loading import load_model, weight_bytes
from graft.finetune.quantize import stored_bytes as packed_bytes
from graft.finetune.sft import run_sft
from graft.quant.linear import NF4Linear, quantize_linears_

ROOT = Path(__file__).resolve().parent.parent
END = "<|endoftext|>"
VOCAB_SIZE = 4096
MODEL = {
    "n_layers": 4,
    "d_model": 256,
    "n_heads": 8,
    "n_kv_heads": 4,
    "d_ff": 768,
    "max_seq_len": 256,
    "init_std": 0.0625,  # 1 / sqrt(d_model): the tied embedding also scores the tokens
}
PRETRAIN = {
    "batch_size": 8,
    "micro_batch": 8,
    "optimizer": "muon",
    "learning_rate": 1.5e-2,
    "warmup_steps": 40,
    "eval_every": 200,
    "eval_batches": 8,
    "checkpoint_every": 100,
    "seed": 0,
}
LORA = LoraConfig(rank=8, alpha=16.0)
# A low-rank update wants the higher rate ("LoRA Without Regret"); neither was tuned on these test sets.
RATES = {"lora": 3e-3, "qlora": 3e-3, "full": 1e-3}
SFT = {"warmup_steps": 20, "checkpoint_every": 0}
BATCH_SIZES = {"sms": 16, "sst2": 32}
STEPS = {"base": 600, "sms": 300, "sst2": 1000}
QUICK_STEPS = {"base": 260, "sms": 150, "sst2": 300}  # --quick
QUICK_WINDOWS = 128  # of validation text; otherwise all
SST2_TRAIN = 40_000  # phrases, of the 60,614
MAX_TEXT_TOKENS = 96  # of a message; what is beyond is cut off, in training and in testing
SPLIT_SEED = 0  # of the data; the runs' seeds are given on the command line


def read_text(path: Path) -> str:
    """A UTF-8 file, gzipped or not."""
    data = path.read_bytes()
    return (gzip.decompress(data) if path.suffix == ".gz" else data).decode()


# --- base ----------------------------------------------------------------------------------------------------------


def stories(folder: Path) -> tuple[list[str], list[str]]:
    """TinyStories for training and for validation; each file marks a story's end in its own way (see the data's README)."""
    lines = read_text(folder / "tinystories_10k.txt.gz").split(END)
    train = lines[:-1]  # the last one is cut short
    train += re.split(r"(?<!\n)\n(?!\n)", read_text(folder / "tiny_stories.txt.gz"))  # one newline; two end a paragraph
    # The validation file has a blank line between paragraphs and stories alike: a new story is known by how it opens.
    val = re.split(r"\n\n+(?=Once upon a time|Once there |Once, there )", read_text(folder / "tinystories_val.txt.gz"))
    return [s.strip() for s in train if s.strip()], [s.strip() for s in val if s.strip()]


def tokenize(data: Path, out: Path) -> dict[str, Any]:
    """Tokenizer from the training stories; OUT/tokens with all of them as `train` and all validation stories as `val`."""
    files = {split: out / f"text/{split}.txt" for split in ("train", "val")}
    counts = {}
    for (split, file), texts in zip(files.items(), stories(data / "tinystories"), strict=True):
        write_file(file, END.join(texts))
        counts[f"n_{split}_stories"] = len(texts)
    tokenizer = Tokenizer.train([files["train"]], vocab_size=VOCAB_SIZE, pattern="gpt4", special_tokens=[END])
    tokenizer.save(out / "tokenizer")
    metas = {
        split: prepare([file], tokenizer, out / f"tokens-{split}", val_fraction=0.0, workers=1, force=True)
        for split, file in files.items()
    }
    # One folder with both: the validation text is a file of its own, which `prepare` has no argument for.
    target = out / "tokens"
    target.mkdir(exist_ok=True)
    meta = metas["train"] | {"sources": [str(file) for file in files.values()]}
    for split, own in metas.items():
        entry = own["splits"]["train"]
        names = [name.replace("train-", f"{split}-") for name in entry["files"]]
        for name, new in zip(entry["files"], names, strict=True):
            shutil.move(out / f"tokens-{split}" / name, target / new)
        meta["splits"] = meta["splits"] | {split: entry | {"files": names}}
        shutil.rmtree(out / f"tokens-{split}")
    write_json(target / "meta.json", meta)
    return counts


def stage_base(data: Path, out: Path, seeds: Sequence[int]) -> dict[str, Any]:
    """Pretrain (or go on) and score on every validation story."""
    del seeds  # of the fine-tuning runs
    counts_file = out / "counts.json"
    if not counts_file.exists():
        write_json(counts_file, tokenize(data, out))
    started = (out / "base/run.json").exists()
    run_pretrain(
        data=out / "tokens",
        tokenizer=out / "tokenizer",
        out=out / "base",
        settings={**MODEL, **PRETRAIN, "steps": STEPS["base"]},
        resume=started,
    )
    summary = read_json(out / "base/summary.json")
    lines = [json.loads(line) for line in (out / "base/metrics.jsonl").read_text().splitlines()]
    train, val = open_tokens(out / "tokens", "train"), open_tokens(out / "tokens", "val")
    model, scored = load_model(out / "base"), validation(out)
    loss = mean_loss(model, scored)
    bigram = bigram_loss(train, val, vocab_size=VOCAB_SIZE)
    sizes = {"n_tokens": len(val), "n_bytes": val.n_bytes}
    plot_run(out / "base", lines={"bigram model": bigram}, title="TinyStories: pretraining the base")
    return read_json(counts_file) | {
        "n_params": summary["n_params"],
        "steps": len(lines),
        "n_train_tokens": len(train),
        "tokens_read": sum(line["n_tokens"] for line in lines),
        "train_s": round(sum(line["step_s"] for line in lines), 1),
        "n_val_tokens": len(val),
        "n_scored_tokens": sum(batch["ids"].numel() for batch in scored),
        "n_val_bytes": val.n_bytes,
        "val_loss": loss,
        "val_bits_per_byte": bits_per_byte(loss, **sizes),
        "bigram_loss": bigram,
        "bigram_bits_per_byte": bits_per_byte(bigram, **sizes),
    }


def validation(out: Path) -> list[dict[str, torch.Tensor]]:
    """Validation windows of the model's length, 16 a batch: all of them, or with --quick some, evenly spread."""
    val = open_tokens(out / "tokens", "val")
    n_batches = math.ceil((QUICK_WINDOWS if STEPS == QUICK_STEPS else len(val)) / 16)
    return evaluation_batches(val, seq_len=MODEL["max_seq_len"], batch_size=16, n_batches=n_batches)


# --- fine-tuning ---------------------------------------------------------------------------------------------------


def sms_rows(data: Path) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """(train, test) of the unique messages, a fifth of them for testing. Plain tab-separated lines, without quoting."""
    labels: dict[str, str] = {}
    for line in read_text(data / "sms_spam/sms.tsv").split("\n"):
        if line.strip():
            label, text = line.split("\t", 1)
            labels.setdefault(text.strip(), label)
    rows = [{"prompt": text, "completion": label} for text, label in labels.items()]
    order = np.random.default_rng(SPLIT_SEED).permutation(len(rows))
    n_test = len(rows) // 5
    return [rows[i] for i in order[n_test:]], [rows[i] for i in order[:n_test]]


def sst2_rows(data: Path) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """(train, test): phrases drawn from the training file, each once, and the 872 whole sentences."""

    def rows_of(file: str) -> list[dict[str, str]]:
        lines = [line for line in read_text(data / "sst2" / file).split("\n")[1:] if line.strip()]
        pairs = dict(line.rsplit("\t", 1) for line in lines)
        names = {"1": "good", "0": "bad"}  # words that the base knows, one token each
        return [{"prompt": text.strip(), "completion": names[label.strip()]} for text, label in pairs.items()]

    train = rows_of("train.tsv.gz")
    chosen = np.random.default_rng(SPLIT_SEED).permutation(len(train))[:SST2_TRAIN]
    return [train[i] for i in chosen], rows_of("test.tsv")


def as_prompts(rows: list[dict[str, str]], tokenizer: Tokenizer, question: str) -> tuple[list[dict[str, str]], int]:
    """`text, newline, question` -> ` answer`, long texts cut; also how many were."""
    made, n_cut = [], 0
    for row in rows:
        text, ids = row["prompt"], tokenizer.encode(row["prompt"])
        if len(ids) > MAX_TEXT_TOKENS:
            text, n_cut = tokenizer.decode(ids[:MAX_TEXT_TOKENS]), n_cut + 1
        made.append({"prompt": f"{text}\n{question}", "completion": f" {row['completion']}"})
    return made, n_cut


def fine_tune(out: Path, task: str, method: str, seed: int, steps: int, test: list[Record]) -> dict[str, Any]:
    """One run and its test figures; a finished one is read back."""
    folder = out / task / f"{method}-{seed}"
    figures_file = out / task / f"{method}-{seed}.json"
    if figures_file.exists():
        return read_json(figures_file)
    summary = run_sft(
        base=out / "base",
        data=out / task / "train.jsonl",
        out=folder,
        method=method,
        lora=LORA,
        settings={**SFT, "batch_size": BATCH_SIZES[task], "learning_rate": RATES[method], "steps": steps, "seed": seed},
        force=True,
        label=f"{task} {method} seed {seed}",
    )
    source = folder if method == "full" else out / "base"
    model = load_model(source, quantize="nf4" if method == "qlora" else None)
    frozen_bytes = weight_bytes(model)
    if method != "full":
        bank = AdapterBank(model)
        bank.load(task, folder)
        bank.use(task)
    written = write_answers(model, Tokenizer.load(source), test, None, batch_size=64)
    trained_file = folder / "model.safetensors"
    figures = score(test, written) | {
        "method": method,
        "seed": seed,
        "steps": steps,
        "train_loss": summary["train_loss"],
        "n_trained_params": summary["n_trained_params"],
        "stored_bytes": trained_file.stat().st_size if method == "full" else stored_bytes(folder),
        "weight_bytes": frozen_bytes,  # of the model that the adapter sits on; of the whole model for full
        "seconds": summary["seconds"],
        "correct": [int(text == answer_of(record)) for text, record in zip(written, test, strict=True)],
    }
    write_json(figures_file, figures)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return figures


def answer_of(record: Record) -> str:
    """The true answer, as `write_answers` strips them."""
    return (record.completion or "").strip()


def score(test: Sequence[Record], written: Sequence[str]) -> dict[str, float]:
    """Accuracy by exact match, and F1 of each label; an answer that is no label at all is wrong."""
    truth = [answer_of(record) for record in test]
    accuracy = sum(a == b for a, b in zip(truth, written, strict=True)) / len(truth)
    return {"accuracy": accuracy} | {f"f1_{label}": value for label, value in f1_scores(truth, written).items()}


def compare_methods(
    data: Path,
    out: Path,
    task: str,
    methods: Sequence[str],
    seeds: Sequence[int],
) -> dict[str, Any]:
    """Every method with every seed on the same records in the same order, and the base alone."""
    rows_of, question = {"sms": (sms_rows, "Label:"), "sst2": (sst2_rows, "It was")}[task]
    tokenizer = Tokenizer.load(out / "tokenizer")
    (train, n_cut), (test, n_cut_test) = (as_prompts(rows, tokenizer, question) for rows in rows_of(data))
    write_file(out / task / "train.jsonl", "".join(json.dumps(row) + "\n" for row in train))
    records = [to_record(row, f"{task} test row {i}") for i, row in enumerate(test, 1)]
    runs = [fine_tune(out, task, method, seed, STEPS[task], records) for seed in seeds for method in methods]
    answers = [answer_of(record) for record in records]
    most = max(set(answers), key=answers.count)
    alone = write_answers(load_model(out / "base"), tokenizer, records, None, batch_size=64)
    return {
        "n_train": len(train),
        "n_test": len(test),
        "share_cut": (n_cut + n_cut_test) / (len(train) + len(test)),
        "most_frequent": most,
        "most_frequent_share": answers.count(most) / len(answers),
        "base_alone_accuracy": score(records, alone)["accuracy"],
        "base_bytes": (out / "base/model.safetensors").stat().st_size,
        "runs": [{key: value for key, value in run.items() if key != "correct"} for run in runs],
        "qlora_minus_lora": paired(runs, "qlora", "lora"),
        "lora_minus_full": paired(runs, "lora", "full"),
    }


def paired(runs: Sequence[dict[str, Any]], ours: str, other: str) -> dict[str, Any]:
    """Difference of accuracies in points, the same seeds and test rows on both sides, with its standard error.

    The error is of the mean over rows of (right here - right there), each row's averaged over the seeds: it says how far
    another test set of this size would move the difference, not another draw of seeds.
    """
    table = {(run["method"], run["seed"]): np.array(run["correct"], float) for run in runs}
    seeds = sorted(seed for method, seed in table if method == ours and (other, seed) in table)
    by_row = np.mean([table[ours, seed] - table[other, seed] for seed in seeds], axis=0)
    accuracy = np.mean([table[other, seed].mean() for seed in seeds])
    return {
        "points": 100 * float(by_row.mean()),
        "standard_error": 100 * float(by_row.std(ddof=1) / math.sqrt(len(by_row))),
        "by_seed": {str(seed): 100 * float((table[ours, seed] - table[other, seed]).mean()) for seed in seeds},
        "rows_that_differ": {str(seed): int((table[ours, seed] != table[other, seed]).sum()) for seed in seeds},
        "n": len(by_row),
        "binomial_error_of_one_accuracy": 100 * math.sqrt(accuracy * (1 - accuracy) / len(by_row)),
    }


def stage_sms(data: Path, out: Path, seeds: Sequence[int]) -> dict[str, Any]:
    """Spam detection by the three methods."""
    return compare_methods(data, out, "sms", ("lora", "full", "qlora"), seeds)


def stage_sst2(data: Path, out: Path, seeds: Sequence[int]) -> dict[str, Any]:
    """Sentiment by the three methods."""
    return compare_methods(data, out, "sst2", ("lora", "full", "qlora"), seeds)


# --- quality of the formats ----------------------------------------------------------------------------------------

FORMATS: dict[str, dict[str, Any] | None] = {
    "float32": None,
    "bf16": None,
    "Int4": {"quant_type": "int4", "double_quant": False},
    "FP4": {"quant_type": "fp4", "double_quant": False},
    "NF4": {"quant_type": "nf4", "double_quant": False},
    "NF4 + DQ": {"quant_type": "nf4", "double_quant": True},
}


@torch.no_grad()
def stage_quality(data: Path, out: Path, seeds: Sequence[int]) -> dict[str, Any]:
    """Validation loss of the same weights in each format. Arithmetic in float32 throughout: only the weights differ."""
    del data, seeds
    base, batches = load_model(out / "base"), validation(out)
    sizes = [int(batch["ids"].numel()) for batch in batches]
    rows, losses = {}, {}
    for name, options in FORMATS.items():
        model, bits = copy.deepcopy(base), {"float32": 32.0, "bf16": 16.0}.get(name, 0.0)
        if options is not None:
            quantize_linears_(model, **options)
            layers = [module for module in model.modules() if isinstance(module, NF4Linear)]
            bits = 8 * sum(map(packed_bytes, layers)) / sum(la.in_features * la.out_features for la in layers)
        elif name == "bf16":
            for parameter in model.parameters():
                parameter.copy_(parameter.bfloat16())
        losses[name] = np.array([mean_loss(model, [batch]) for batch in batches])
        rows[name] = {"bits_per_weight": bits, "val_loss": float(np.average(losses[name], weights=sizes))}
    for name, row in rows.items():
        change = losses[name] - losses["bf16"]  # batch by batch, so that hard and easy text cancels
        row["perplexity"] = math.exp(row["val_loss"])
        row["above_bf16_percent"] = 100 * (row["val_loss"] / rows["bf16"]["val_loss"] - 1)
        row["above_bf16"] = float(change.mean())
        row["standard_error"] = float(change.std(ddof=1) / math.sqrt(len(change)))
    return {"n_val_tokens": sum(sizes), "formats": rows}


STAGES: dict[str, Callable[[Path, Path, Sequence[int]], dict[str, Any]]] = {
    "base": stage_base,
    "sms": stage_sms,
    "sst2": stage_sst2,
    "quality": stage_quality,
}


def main() -> None:
    """Run the stages that are asked for and not there yet, then print what is known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "../shared/data", help="folder of the data sets")
    parser.add_argument("--out", type=Path, default=Path("runs/real"), help="folder for everything that is made")
    parser.add_argument("--stages", default=",".join(STAGES), help=f"of {', '.join(STAGES)}; comma-separated")
    parser.add_argument("--seeds", default="0,1", help="of the fine-tuning runs, comma-separated")
    parser.add_argument("--fresh", action="store_true", help="run these stages again; an unfinished base goes on")
    parser.add_argument("--quick", action="store_true", help="half the steps or less, less validation text")
    args = parser.parse_args()
    if args.quick:
        STEPS.update(QUICK_STEPS)
    seeds = [int(seed) for seed in args.seeds.split(",")]
    for name in args.stages.split(","):
        kept = args.out / f"{name}.json"
        if kept.exists() and not args.fresh:
            continue
        if name not in STAGES:
            parser.error(f"unknown stage {name!r}; choose {', '.join(STAGES)}")
        began = time.perf_counter()
        figures = STAGES[name](args.data, args.out, seeds)
        write_json(kept, figures | {"stage_s": round(time.perf_counter() - began, 1)})
    results: dict[str, Any] = {
        name: read_json(args.out / f"{name}.json") for name in STAGES if (args.out / f"{name}.json").exists()
    }
    results["about"] = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "hardware": hardware(),
        "command": "python bench/real_data.py" + " --quick" * args.quick,
        "versions": versions(),
        "settings": {
            "model": MODEL,
            "pretrain": PRETRAIN,
            "sft": SFT
            | {"batch_size": BATCH_SIZES, "learning_rate": RATES, "lora_rank": LORA.rank, "lora_alpha": LORA.alpha},
            "steps": STEPS,
            "sst2_train": SST2_TRAIN,
            "max_text_tokens": MAX_TEXT_TOKENS,
            "torch_threads": torch.get_num_threads(),
        },
    }
    target = ROOT / "bench/results/real_data.json"
    target.parent.mkdir(exist_ok=True)
    write_json(target, results)
    print(markdown(results), end="")


if __name__ == "__main__":
    main()
