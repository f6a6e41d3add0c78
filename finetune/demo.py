"""`graft demo`: the whole chain on text that every machine with Python has, in about five minutes on two CPU cores.

standard library -> tokenizer -> base -> three adapters -> one process that swaps them -> memory table -> report.md
"""

import ast
import statistics
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ..base.checkpoint import write_file, write_json
from ..base.data.shards import open_tokens, prepare
from ..base.device import resolve_device
from ..base.evaluate import bigram_loss
from ..base.model.transformer import Transformer
from ..base.plots import plot_run
from ..base.pretrain import run_pretrain
from ..base.runlog import versions
from ..base.tokenizer.tokenizer import Tokenizer
from .adapters.bank import AdapterBank
from .adapters.files import stored_bytes
from .adapters.lora import LoraConfig
from .baselines import NaiveBayes, majority_label
from .data.records import Record, read_records
from .evaluation.answers import write_answers
from .evaluation.labels import most_likely
from .evaluation.metrics import wilson_interval
from .generate import generate
from .memory.measure import measure_memory
from .memory.picture import memory_picture
from .sft import run_sft
from .tasks import TASKS, write_task

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
    "sentiment": {"steps": 550, "learning_rate": 4e-3},
    "translation": {"steps": 400, "learning_rate": 8e-3},
}
N_TRAIN, N_EVAL = 4000, 200
N_WRONG = 2  # mistakes of each adapter that the report shows
BASELINES = {  # a task's figure -> its column
    "majority": "commonest label",
    "bag_of_words": "words alone",
    "base_accuracy": "base, as it writes",
    "base_likelihood": "base, likelier label",
}


@dataclass(frozen=True)
class TaskResult:
    """One row of the adapters' table."""

    name: str
    n: int  # held-out records, of combinations that no training record has
    majority: float | None  # share right of the commonest label of training; None: the task has no labels
    bag_of_words: float | None  # of naive Bayes over the prompts' words
    base_accuracy: float  # exact matches, the base alone, which never saw the format
    base_likelihood: float | None  # the base alone, its more probable label
    n_correct: int  # exact matches with the adapter
    low: float  # 95% interval of its share
    high: float
    adapter_bytes: int  # on disk
    wrong: list[dict[str, str]]  # the adapter's first mistakes

    @property
    def accuracy(self) -> float:
        return self.n_correct / self.n


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
    with _stage(console, seconds, "3/5 adapters", "spam, sentiment and translation by LoRA on the frozen base"):
        _train_adapters(out, seed, device)
    with _stage(console, seconds, "4/5 one base, three adapters", "loaded once, swapped in one process"):
        tasks, first_token, mixed = _use_adapters(out, device, tokenizer)
    with _stage(console, seconds, "5/5 memory", "full fine-tuning, LoRA and QLoRA, predicted and measured"):
        memory = _memory(out)
    report = {
        "base": pretrained,
        "tasks": [{**vars(task), "accuracy": task.accuracy} for task in tasks],
        "base_bytes": (out / "base/model.safetensors").stat().st_size,
        "first_token_ms": first_token,
        "mixed_batch": mixed,
        "memory": memory,
        "settings": {"seed": seed, "device": device, "threads": torch.get_num_threads(), "n_train": N_TRAIN},
        "versions": versions(),
        "stage_seconds": seconds,
        "seconds": round(sum(seconds.values()), 1),
    }
    write_json(out / "report.json", report)
    write_file(out / "report.md", _markdown(report))
    _print_tables(console, report, out)
    return report


@contextmanager
def _stage(console: Console, seconds: dict[str, float], name: str, what: str) -> Iterator[None]:
    """Say what comes, and note how long it took."""
    console.print(f"\n[bold]{name}[/bold]: {what}", highlight=False)
    began = time.perf_counter()
    yield
    seconds[name.partition(" ")[2]] = round(time.perf_counter() - began, 1)


# --- 1. text and tokenizer -----------------------------------------------------------------------------------------


def stdlib_documents(limit: int) -> Iterator[tuple[str, str]]:
    """(name, text) of the standard library: pydoc's topics and every docstring first, then sources, to about `limit` bytes.

    In a fixed order; the same Python gives the same text.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(
        path for path in root.rglob("*.py") if not {"site-packages", "test", "tests", "idlelib"} & set(path.parts)
    )
    size = 0
    for name, text in chain(_topics(), _docstrings(files), _sources(files)):
        if size >= limit:
            return
        size += len(text.encode())
        yield name, text


def _topics() -> Iterator[tuple[str, str]]:
    """The language reference that `help('if')` shows."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield f"topic {name}", topics[name].strip()


def _docstrings(files: list[Path]) -> Iterator[tuple[str, str]]:
    for path in files:
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, ValueError):
            continue  # a test file for the parser itself
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        for node in ast.walk(tree):
            text = ast.get_docstring(node) if isinstance(node, kinds) else None
            if text and len(text) > 40:
                yield f"docstring in {path.name}", text


def _sources(files: list[Path]) -> Iterator[tuple[str, str]]:
    """Cut at the blank lines between top-level blocks: short documents teach the model where a text ends."""
    for path in files:
        try:
            blocks = path.read_text(encoding="utf-8").split("\n\n\n")
        except UnicodeDecodeError:
            continue
        for block in blocks:
            if len(block) > 40:
                yield f"source {path.name}", block.strip("\n")


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
        run_sft(
            base=out / "base",
            data=out / f"data/{name}/train.jsonl",
            out=out / f"adapters/{name}",
            method="lora",
            lora=LORA,
            settings={**SFT, **TASK_SETTINGS[name], "seed": seed},
            force=True,
            device=device,
            label=name,
        )


# --- 4. one base, three adapters -----------------------------------------------------------------------------------


def _use_adapters(
    out: Path, device: str, tokenizer: Tokenizer
) -> tuple[list[TaskResult], dict[str, float], list[dict[str, str | None]]]:
    from .loading import load_model

    model = load_model(out / "base", device=device)
    bank = AdapterBank(model)
    for name in TASKS:
        bank.load(name, out / f"adapters/{name}")
    held_out = {name: read_records(out / f"data/{name}/eval.jsonl") for name in TASKS}
    results = []
    for name, records in held_out.items():
        train = read_records(out / f"data/{name}/train.jsonl") if TASKS[name].labels else []
        results.append(_score(bank, tokenizer, name, records, train, stored_bytes(out / f"adapters/{name}")))
    return results, _first_token_ms(bank, tokenizer), _mixed_batch(model, tokenizer, held_out)


def _score(
    bank: AdapterBank, tokenizer: Tokenizer, name: str, records: list[Record], train: list[Record], n_bytes: int
) -> TaskResult:
    """One task: what needs no model (where it has labels, given by `train`), the base alone, the adapter."""
    model, truth = bank.model, [_answer(record) for record in records]
    majority = words = likelihood = None
    bank.use(None)
    alone = _share(truth, write_answers(model, tokenizer, records, None, batch_size=50))
    if train:
        labels = [_answer(record) for record in train]
        majority = _share(truth, [majority_label(labels)] * len(truth))
        counted = NaiveBayes([record.prompt or "" for record in train], labels)
        words = _share(truth, [counted.predict(record.prompt or "") for record in records])
        likelihood = _share(truth, most_likely(model, tokenizer, records, None))
    bank.use(name)
    written = write_answers(model, tokenizer, records, None, batch_size=50)
    n_correct = sum(a == b for a, b in zip(truth, written, strict=True))
    low, high = wilson_interval(n_correct, len(records))
    wrong = [
        {"adapter": name, "prompt": record.prompt or "", "answer": answer, "expected": right}
        for record, answer, right in zip(records, written, truth, strict=True)
        if answer != right
    ]
    return TaskResult(
        name, len(records), majority, words, alone, likelihood, n_correct, low, high, n_bytes, wrong[:N_WRONG]
    )


def _answer(record: Record) -> str:
    return (record.completion or "").strip()


def _share(truth: list[str], predicted: list[str]) -> float:
    return sum(a == b for a, b in zip(truth, predicted, strict=True)) / len(truth)


def _first_token_ms(bank: AdapterBank, tokenizer: Tokenizer, n: int = 60) -> dict[str, float]:
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


def _mixed_batch(
    model: Transformer, tokenizer: Tokenizer, held_out: dict[str, list[Record]]
) -> list[dict[str, str | None]]:
    """One batch, a different adapter in each row."""
    rows = [(name, records[i]) for i in range(2) for name, records in held_out.items()]
    names = [name for name, _ in rows]
    written = write_answers(model, tokenizer, [record for _, record in rows], None, adapters=names)
    return [
        {"adapter": name, "prompt": record.prompt, "answer": answer, "expected": (record.completion or "").strip()}
        for (name, record), answer in zip(rows, written, strict=True)
    ]


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


def _rows(report: dict[str, Any]) -> dict[str, tuple[list[str], list[list[str]]]]:
    """Every table as title -> (header, rows), for the terminal and for report.md."""
    base_bytes = report["base_bytes"]
    mib: Callable[[float], str] = lambda n: f"{n / 2**20:.2f} MiB"  # noqa: E731
    tasks = [
        [
            task["name"],
            str(task["n"]),
            *("" if task[key] is None else f"{task[key]:.1%}" for key in BASELINES),
            f"{task['accuracy']:.1%} ({task['low']:.1%} to {task['high']:.1%})",
            f"{task['adapter_bytes']:,}",
            f"{task['adapter_bytes'] / base_bytes:.1%}",
        ]
        for task in report["tasks"]
    ]
    answers: Callable[[list[dict[str, Any]]], list[list[str]]] = lambda rows: [  # noqa: E731
        [r["adapter"], r["prompt"].replace("\n", " / "), r["answer"].replace("\n", " / "), r["expected"]] for r in rows
    ]
    wrong = [row for task in report["tasks"] for row in task["wrong"]]
    header = ["adapter", "prompt", "answer", "expected"]
    sizes = ("weights", "gradients", "optimizer", "predicted_peak", "measured_peak")
    memory = [[r["method"], *(mib(r[key]) for key in sizes), f"{r['error']:+.1%}"] for r in report["memory"]]
    return {
        "Held-out accuracy (exact match on unseen combinations)": (
            ["task", "n", *BASELINES.values(), "with adapter (95% interval)", "adapter bytes", "of the base"],
            tasks,
        ),
        "One batch, an adapter for each row": (header, answers(report["mixed_batch"])),
        "Wrong answers, the first of each adapter": (header, answers(wrong)),
        "Memory of a training step (2 x 64 tokens, float32)": (
            ["method", "weights", "gradients", "optimizer", "predicted peak", "measured peak", "error"],
            memory,
        ),
    }


def _figures(report: dict[str, Any]) -> list[str]:
    base = report["base"]
    return [
        f"base: {base['n_params']:,} parameters, {report['base_bytes']:,} bytes; validation loss {base['val_loss']:.3f} "
        f"against {base['bigram_loss']:.3f} of a bigram model",
        f"first token after an adapter swap: {report['first_token_ms']['after_swap']:.1f} ms, without a swap "
        f"{report['first_token_ms']['no_swap']:.1f} ms (medians of 60, a prompt of about 20 tokens)",
        f"the whole demo: {report['seconds']:.0f} s ("
        + ", ".join(f"{name} {seconds:.0f} s" for name, seconds in report["stage_seconds"].items())
        + f") on {report['settings']['device']} with {report['settings']['threads']} threads, seed {report['settings']['seed']}",
        "versions: " + ", ".join(f"{name} {version}" for name, version in report["versions"].items()),
    ]


def _next_steps(out: str) -> list[str]:
    return [
        f"graft chat --base {out}/base --adapter spam={out}/adapters/spam --adapter sentiment={out}/adapters/sentiment",
        f"graft eval --base {out}/base --adapter {out}/adapters/spam --data {out}/data/spam/eval.jsonl",
        f"graft sft --base {out}/base --data {out}/data/spam/train.jsonl --out runs/spam-qlora --qlora --steps 100",
        f"graft adapter merge --base {out}/base --adapter {out}/adapters/spam --out runs/spam-merged",
        "graft vram estimate --model llama-7b --method qlora --seq 512",
    ]


def _print_tables(console: Console, report: dict[str, Any], out: Path) -> None:
    console.print()
    for title, (header, rows) in _rows(report).items():
        table = Table(*header, title=title, title_justify="left")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    for line in _figures(report):
        console.print(line, highlight=False)
    console.print(f"\n{out}/report.md, loss.png and memory.png hold this. What to try next:", highlight=False)
    for line in _next_steps(str(out)):
        console.print(f"  {line}", highlight=False, soft_wrap=True)


def _markdown(report: dict[str, Any]) -> str:
    lines = ["# graft demo", "", *[f"- {line}" for line in _figures(report)], ""]
    lines += ["![loss](loss.png)", ""]
    for title, (header, rows) in _rows(report).items():
        lines += [f"## {title}", "", f"| {' | '.join(header)} |", f"|{' --- |' * len(header)}"]
        lines += [f"| {' | '.join(row)} |" for row in rows]
        lines.append("")
    lines += ["![memory](memory.png)", ""]
    return "\n".join(lines)
