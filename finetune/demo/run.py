"""`graft demo`: the whole chain on text that every machine with Python has, in minutes on two CPU cores.

standard library -> tokenizer -> base -> four adapters -> one process that swaps them -> memory table -> report.md
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from ...base.checkpoint import write_file, write_json
from ...base.data.shards import open_tokens, prepare
from ...base.device import resolve_device
from ...base.evaluate import bigram_loss
from ...base.plots import plot_run
from ...base.pretrain import run_pretrain
from ...base.runlog import versions
from ...base.tokenizer.tokenizer import Tokenizer
from ..adapters.lora import LoraConfig
from ..memory.measure import measure_memory
from ..memory.picture import memory_picture
from ..sft import run_sft
from ..tasks import TASKS, write_task
from .report import markdown, print_report
from .scores import use_adapters
from .talks import write_talks
from .text import stdlib_documents

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
END = SPECIAL_TOKENS[0]
VOCAB_SIZE = 2048
TEXT_BYTES = 6_000_000  # of documentation and sources; more is not read twice in the time there is
# A tied embedding also scores the tokens: rows of length about 1 (init_std = 1 / sqrt(d_model)) let few steps do it.
MODEL = {
    "n_layers": 4,
    "d_model": 192,
    "n_heads": 6,
    "n_kv_heads": 3,
    "d_ff": 512,
    "max_seq_len": 128,
    "init_std": 0.07,
}
PRETRAIN = {
    "steps": 600,
    "batch_size": 8,
    "optimizer": "muon",
    "learning_rate": 1.5e-2,
    "warmup_steps": 30,
    "eval_every": 100,
    "checkpoint_every": 200,
}
LORA = LoraConfig(rank=6, alpha=12.0)
SFT = {"batch_size": 16, "warmup_steps": 20, "checkpoint_every": 200}
TASK_SETTINGS = {  # translation learns from every word and bears a larger step; the two labels need more patience
    "spam": {"steps": 350, "learning_rate": 3e-3},
    "sentiment": {"steps": 420, "learning_rate": 4e-3},
    "translation": {"steps": 400, "learning_rate": 8e-3},
    "chat": {"steps": 200, "learning_rate": 8e-3},
}
N_TRAIN, N_EVAL = 4000, 200


def run_demo(out: Path | str, *, seed: int = 0, force: bool = False, device: str = "auto") -> dict[str, Any]:
    """Run every stage into `out`; print the tables, leave report.md, pictures and what each stage wrote.

    The numbers (not the times) follow from the seed alone. Raises FileExistsError for an `out` that is not empty.
    """
    out, device, console = Path(out), resolve_device(device), Console()
    if out.exists() and any(out.iterdir()) and not force:
        raise FileExistsError(f"{out} is not empty; use --force to run the demo there again, or another --out")
    seconds: dict[str, float] = {}
    with _stage(console, seconds, "1/5 text and tokenizer", "the standard library's documentation and sources"):
        tokenizer = _tokenize(out, seed)
    with _stage(console, seconds, "2/5 base", "a Llama-style model from scratch"):
        pretrained = _pretrain(out, seed, device)
    with _stage(
        console, seconds, "3/5 adapters", "spam, sentiment, translation and conversations by LoRA on the frozen base"
    ):
        _train_adapters(out, seed, device)
    with _stage(console, seconds, "4/5 one base, four adapters", "loaded once, swapped in one process"):
        used = use_adapters(out, list(TASK_SETTINGS), device, tokenizer, seed=seed)
    with _stage(console, seconds, "5/5 memory", "full fine-tuning, LoRA and QLoRA, predicted and measured"):
        memory = _memory(out)
    report = {
        "base": pretrained,
        **used,
        "base_bytes": (out / "base/model.safetensors").stat().st_size,
        "memory": memory,
        "settings": {
            "seed": seed,
            "device": device,
            "threads": torch.get_num_threads(),
            "n_train": N_TRAIN,
            "n_eval": N_EVAL,
            "model": MODEL,
            "pretrain": PRETRAIN,
            "rank": LORA.rank,
            "alpha": LORA.alpha,
            **SFT,
            "adapters": TASK_SETTINGS,
        },
        "versions": versions(),
        "stage_seconds": seconds,
        "seconds": round(sum(seconds.values()), 1),
    }
    write_json(out / "report.json", report)
    write_file(out / "report.md", markdown(report))
    print_report(console, report, out)
    return report


@contextmanager
def _stage(console: Console, seconds: dict[str, float], name: str, what: str) -> Iterator[None]:
    """Say what comes, and note how long it took."""
    console.print(f"\n[bold]{name}[/bold]: {what}", highlight=False)
    began = time.perf_counter()
    yield
    seconds[name.partition(" ")[2]] = round(time.perf_counter() - began, 1)


# --- 1. text and tokenizer -----------------------------------------------------------------------------------------


def _tokenize(out: Path, seed: int) -> Tokenizer:
    text = out / "data/text.txt"
    documents = [document for _, document in stdlib_documents(TEXT_BYTES) if END not in document]
    write_file(text, END.join(documents))
    with Progress(transient=True) as progress:
        bars: dict[str, Any] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in bars:
                bars[stage] = progress.add_task(stage, total=total)
            progress.update(bars[stage], completed=done, total=total)

        tokenizer = Tokenizer.train(
            [text], vocab_size=VOCAB_SIZE, pattern="gpt4", special_tokens=SPECIAL_TOKENS, progress=show
        )
        tokenizer.save(out / "tokenizer")
        meta = prepare([text], tokenizer, out / "data/tokens", val_fraction=0.03, seed=seed, force=True, progress=show)
    train = meta["splits"]["train"]
    print(
        f"{len(documents):,} documents, {train['n_bytes']:,} bytes -> {train['n_tokens']:,} tokens "
        f"({train['n_bytes'] / train['n_tokens']:.2f} bytes a token), vocabulary {tokenizer.vocab_size:,}"
    )
    return tokenizer


# --- 2. base -------------------------------------------------------------------------------------------------------


def _pretrain(out: Path, seed: int, device: str) -> dict[str, Any]:
    summary = run_pretrain(
        data=out / "data/tokens",
        tokenizer=out / "tokenizer",
        out=out / "base",
        settings={**MODEL, **PRETRAIN, "seed": seed},
        force=True,
        device=device,
    )
    tokens, held_out = (open_tokens(out / "data/tokens", split) for split in ("train", "val"))
    bigram = bigram_loss(tokens, held_out, vocab_size=VOCAB_SIZE)
    plot_run(out / "base", lines={"bigram model": bigram}, title="graft demo: pretraining the base")
    (out / "loss.png").write_bytes((out / "base/loss.png").read_bytes())
    print(
        f"{summary['n_params']:,} parameters, validation loss {summary['val_loss']:.3f} nats a token "
        f"({summary['val_bits_per_byte']:.3f} bits a byte); a bigram model on the same tokens: {bigram:.3f}"
    )
    return {key: summary[key] for key in ("n_params", "val_loss", "val_bits_per_byte")} | {"bigram_loss": bigram}


# --- 3. adapters ---------------------------------------------------------------------------------------------------


def _train_adapters(out: Path, seed: int, device: str) -> None:
    for name in TASKS:
        write_task(out / "data" / name, name, seed=seed, n_train=N_TRAIN, n_eval=N_EVAL)
    write_talks(out / "data/chat", seed=seed, n_train=N_TRAIN, n_eval=N_EVAL)
    for name, own in TASK_SETTINGS.items():
        run_sft(
            base=out / "base",
            data=out / f"data/{name}/train.jsonl",
            out=out / f"adapters/{name}",
            method="lora",
            lora=LORA,
            settings={**SFT, **own, "seed": seed},
            force=True,
            device=device,
            label=name,
        )


# --- 5. memory -----------------------------------------------------------------------------------------------------

MEMORY_ROWS: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "LoRA": {"method": "lora"},
    "QLoRA": {"method": "qlora"},
    "QLoRA, single": {"method": "qlora", "double_quant": False},
}


def _memory(out: Path) -> list[dict[str, Any]]:
    """A training step of the demo's base by each method: counted on fake tensors before, on real ones after."""
    rows, estimates, measured = [], {}, {}
    for label, options in MEMORY_ROWS.items():
        result = measure_memory(
            out / "base",
            batch_size=2,
            seq_len=64,
            dtype="float32",
            checkpointing=True,
            rank=LORA.rank,
            device="cpu",
            **options,
        )
        estimates[label], measured[label] = result.predicted, result.measured_bytes
        rows.append(
            {
                "method": label,
                "weights": result.predicted.weights + result.predicted.adapters,
                "gradients": result.predicted.gradients,
                "optimizer": result.predicted.optimizer,
                "predicted_peak": result.predicted.peak_bytes,
                "measured_peak": result.measured_bytes,
                "error": result.error,
            }
        )
    memory_picture(
        estimates, out / "memory.png", measured=measured, title="graft demo: one training step, 2 x 64 tokens"
    )
    return rows


# --- the report ----------------------------------------------------------------------------------------------------
