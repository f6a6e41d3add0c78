"""Records -> figures: loss over the labels, and for answers how many are right."""

from collections.abc import Sequence
from typing import Any

from ...base.evaluate import mean_loss
from ...base.model.transformer import Transformer
from ...base.tokenizer.tokenizer import Tokenizer
from ..data.chat import ChatTemplate, encode_whole, split_answer
from ..data.dataset import encode_dataset
from ..data.packing import collate_padded
from ..data.records import Record
from .answers import sample_figures, write_answers
from .labels import most_likely
from .likelihood import Progress
from .metrics import f1_scores, loss_figures, share, text_figures
from .options import MAX_LABELS, EvalOptions
from .prompts import usable


def evaluate_records(
    model: Transformer,
    tokenizer: Tokenizer,
    records: Sequence[Record],
    template: ChatTemplate | None,
    *,
    batch_size: int = 32,
    device: str = "cpu",
    options: EvalOptions | None = None,  # None: the defaults, with this batch size
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Loss, perplexity and bits a byte over the labels; for answers also how many are right, with a 95% interval and, where
    they are few, F1; the text metrics and samples that the options ask for.

    With the bank's active adapter, if the model has one. Texts longer than the model are cut into windows. Raises
    ValueError that lists every empty row, row without an answer and prompt without room, where the options don't drop them.
    """
    options = options or EvalOptions(batch_size=batch_size)
    whole = [record for record in records if record.empty is None]
    if not records or (whole and all(record.text is not None for record in whole)):
        _refuse_for_text(options)
        return _document_figures(model, tokenizer, records, options, device)
    kept, counts = usable(model.config.max_seq_len, tokenizer, records, template, options)
    figures: dict[str, Any] = {"n_records": len(kept), **{name: count for name, count in counts.items() if count}}
    figures |= _label_loss(model, tokenizer, kept, template, options, device)
    truth = [split_answer(record)[1].strip() for record in kept]
    if options.score == "likelihood":
        written = most_likely(model, tokenizer, kept, template, options=options, progress=progress)
    else:
        written = write_answers(
            model, tokenizer, kept, template, batch_size=options.batch_size, options=options, progress=progress
        )
    figures |= answer_figures(truth, written, options)
    if options.n_samples:
        figures |= sample_figures(model, tokenizer, kept, template, options=options, progress=progress)
    return figures


def answer_figures(truth: Sequence[str], written: Sequence[str], options: EvalOptions) -> dict[str, Any]:
    """How many answers are right, with a 95% interval; F1 where the true ones are few; the text metrics asked for."""
    right = [a == b for a, b in zip(truth, written, strict=True)]
    figures: dict[str, Any] = {"score": options.score, "n_correct": sum(right), **share("accuracy", right)}
    if len(set(truth)) <= MAX_LABELS:
        scores = f1_scores(truth, written)
        figures["f1_macro"] = sum(scores.values()) / len(scores)
        figures |= {f"f1_{label}": score for label, score in scores.items()}
    return figures | text_figures(options.metrics, truth, written)


def _label_loss(
    model: Transformer,
    tokenizer: Tokenizer,
    records: Sequence[Record],
    template: ChatTemplate | None,
    options: EvalOptions,
    device: str,
) -> dict[str, float]:
    limit, size = model.config.max_seq_len + 1, options.batch_size
    special = options.dataset.special_tokens
    encoded = [encode_whole(record, tokenizer, template, special_tokens=special) for record in records]
    n_cut = sum(
        len(e.ids) > limit for e in encoded
    )  # answers longer than the --max-new-tokens that prompts leave room for
    encoded = [type(e)(e.ids[:limit], e.loss_mask[:limit]) for e in encoded]
    batches = [collate_padded(encoded[i : i + size]) for i in range(0, len(encoded), size)]
    n_labels = sum(int(e.loss_mask[1:].sum()) for e in encoded)
    figures = loss_figures(mean_loss(model, batches, device=device), n_labels, sum(map(_learned_bytes, records)))
    if n_cut:
        del figures["bits_per_byte"]  # the bytes of what was cut are not known
        return {"n_cut": n_cut, **figures}
    return figures


def _refuse_for_text(options: EvalOptions) -> None:
    """Raise ValueError for what is asked about answers, which texts haven't."""
    for flag, given in (
        ("--score likelihood", options.score != "exact"),
        ("--metric", options.metrics),
        ("--samples", options.n_samples),
        ("--max-new-tokens", options.max_new_tokens is not None),
    ):
        if given:
            raise ValueError(f"{flag} is about answers, the data is text without any; leave it out")


def _learned_bytes(record: Record) -> int:
    """Bytes of the record's answers: what its labels, less the end tokens, spell."""
    if record.messages is None:
        return max(1, len((record.completion or "").encode()))
    turns = record.messages[record.n_prompt_messages :]
    return max(1, sum(len(str(turn["content"]).encode()) for turn in turns if turn["role"] == "assistant"))


def _document_figures(
    model: Transformer, tokenizer: Tokenizer, records: Sequence[Record], options: EvalOptions, device: str
) -> dict[str, Any]:
    """Every token after a window's first is scored once; windows overlap by the one token they start from."""
    if not any(record.text for record in records):
        raise ValueError("the data holds no text to score; give a file with text, or records with answers")
    rows, report = encode_dataset(records, tokenizer, None, model.config.max_seq_len + 1, options.dataset)
    size = options.batch_size
    batches = [collate_padded(rows[i : i + size]) for i in range(0, len(rows), size)]
    loss = mean_loss(model, batches, device=device)
    used = {report.sources[i] for i in range(len(rows))}
    n_bytes = sum(len((records[i].text or "").encode()) for i in used)
    return {
        "n_documents": len(used),
        **({"n_empty": report.n_empty} if report.n_empty else {}),
        "n_tokens": report.n_labels,
        **loss_figures(loss, report.n_labels, n_bytes),
    }
