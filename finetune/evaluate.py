"""`graft eval`: loss, and for records with an answer the exact matches of what the model writes."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..base.data.documents import read_documents
from ..base.device import resolve_device
from ..base.evaluate import bits_per_byte, mean_loss
from ..base.model.transformer import Transformer
from ..base.tokenizer.tokenizer import Tokenizer
from .adapters.bank import AdapterBank
from .data.chat import ChatTemplate, encode_prompt, encode_record, split_answer
from .data.packing import collate_padded
from .data.records import SUFFIXES, Record, read_records
from .generate import generate_rows, start_ids
from .loading import load_model

MAX_LABELS = 20  # so few distinct answers are classes, and F1 is given


def run_evaluate(
    base: Path | str,
    data: Path | str,
    *,
    adapter: Path | str | None = None,
    limit: int | None = None,
    dtype: str = "float32",
    device: str = "auto",
) -> dict[str, Any]:
    """Score a base, or a base with an adapter, on a file of records or of plain text; returns named figures."""
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} must be >= 1; leave it out to score every record")
    data, device = Path(data), resolve_device(device)
    model = load_model(base, dtype=dtype, device=device)
    tokenizer = Tokenizer.load(base)
    source = None
    if adapter is not None:
        bank = AdapterBank(model)
        bank.load("evaluated", adapter)
        bank.use("evaluated")
        source = bank.adapters["evaluated"].chat_template
    suffix = Path(data.stem).suffix if data.suffix == ".gz" else data.suffix
    records = (read_records(data) if suffix in SUFFIXES else _documents(data, tokenizer))[:limit]
    return evaluate_records(model, tokenizer, records, ChatTemplate.of(tokenizer, source), device=device)


def _documents(file: Path, tokenizer: Tokenizer) -> list[Record]:
    """A text file's documents, cut where it spells the end-of-text token."""
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.token_bytes(tokenizer.eos_token_id).decode()]
    texts = [b""]
    for piece in read_documents([file], separators=eos):
        texts[-1] += piece.data
        if piece.ends:
            texts.append(b"")
    return [Record(f"{file} document {i}", text=text.decode()) for i, text in enumerate(texts, 1) if text]


def evaluate_records(
    model: Transformer,
    tokenizer: Tokenizer,
    records: Sequence[Record],
    template: ChatTemplate | None,
    *,
    batch_size: int = 32,
    device: str = "cpu",
) -> dict[str, Any]:
    """Loss over the labels; for text also bits per byte, for answers also exact match and, for labels, F1.

    With the bank's active adapter, if the model has one. Texts longer than the model are cut into windows.
    """
    if all(record.text is not None for record in records):
        return _text_figures(model, tokenizer, records, batch_size, device)
    limit = model.config.max_seq_len + 1
    encoded = [encode_record(record, tokenizer, template, limit) for record in records]
    batches = [collate_padded(encoded[i : i + batch_size]) for i in range(0, len(encoded), batch_size)]
    answers = [split_answer(record)[1].strip() for record in records]
    written = write_answers(model, tokenizer, records, template, batch_size=batch_size)
    figures: dict[str, Any] = {
        "n_records": len(records),
        "loss": mean_loss(model, batches, device=device),
        "accuracy": sum(a == b for a, b in zip(answers, written, strict=True)) / len(records),
    }
    if len(set(answers)) <= MAX_LABELS:
        scores = f1_scores(answers, written)
        figures["f1_macro"] = sum(scores.values()) / len(scores)
        figures |= {f"f1_{label}": score for label, score in scores.items()}
    return figures


def write_answers(
    model: Transformer,
    tokenizer: Tokenizer,
    records: Sequence[Record],
    template: ChatTemplate | None,
    *,
    batch_size: int = 32,
    adapters: Sequence[str | None] | None = None,  # for each record, from the model's bank
) -> list[str]:
    """The greedy answer to each record's prompt, stripped. Room is given for the longest true answer and two tokens."""
    pairs = [split_answer(record) for record in records]
    prompts = [
        start_ids(
            encode_prompt(prompt, tokenizer, template, tools=record.tools, args=record.template_args).tolist(), tokenizer
        )
        for record, (prompt, _) in zip(records, pairs, strict=True)
    ]
    room = max(len(tokenizer.encode(answer)) for _, answer in pairs) + 2
    for record, prompt in zip(records, prompts, strict=True):
        if len(prompt) + room > model.config.max_seq_len:
            raise ValueError(
                f"{record.where}: the prompt has {len(prompt)} tokens and the answers need {room}, but the model reads "
                f"{model.config.max_seq_len}; shorten it, or leave it out"
            )
    written = [""] * len(records)
    order = sorted(range(len(records)), key=lambda i: len(prompts[i]))  # rows of like length waste no padding
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        texts = generate_rows(
            model,
            tokenizer,
            [prompts[i] for i in rows],
            max_new_tokens=room,
            template=template,
            adapters=[adapters[i] for i in rows] if adapters is not None else None,
        )
        for i, text in zip(rows, texts, strict=True):
            written[i] = text.strip()
    return written


def f1_scores(truth: Sequence[str], predicted: Sequence[str]) -> dict[str, float]:
    """F1 = 2 TP / (2 TP + FP + FN) of each label that occurs in the truth."""
    hits = Counter(t for t, p in zip(truth, predicted, strict=True) if t == p)
    in_truth, in_predicted = Counter(truth), Counter(predicted)
    return {label: 2 * hits[label] / (in_truth[label] + in_predicted[label]) for label in sorted(in_truth)}


def _text_figures(
    model: Transformer, tokenizer: Tokenizer, records: Sequence[Record], batch_size: int, device: str
) -> dict[str, Any]:
    """Every token after a window's first is scored once; windows overlap by the one token they start from."""
    window = model.config.max_seq_len
    whole = [encode_record(record, tokenizer, None, 1 << 62) for record in records]
    pieces = [
        type(document)(document.ids[i : i + window + 1], document.loss_mask[i : i + window + 1])
        for document in whole
        for i in range(0, max(1, len(document.ids) - 1), window)
    ]
    batches = [collate_padded(pieces[i : i + batch_size]) for i in range(0, len(pieces), batch_size)]
    loss = mean_loss(model, batches, device=device)
    n_bytes = sum(len(record.text.encode()) for record in records if record.text is not None)
    if not n_bytes:
        raise ValueError("the data holds no text to score; give a file with text, or records with answers")
    n_tokens = sum(len(document.ids) - 1 for document in whole)
    return {
        "n_documents": len(records),
        "n_tokens": n_tokens,
        "loss": loss,
        "bits_per_byte": bits_per_byte(loss, n_tokens=n_tokens, n_bytes=n_bytes),
    }
