"""`graft eval`: a base and its adapters, loaded once, on the same records or benchmarks."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...base.device import resolve_device
from ...base.text.documents import read_documents
from ...base.tokenizer.tokenizer import Tokenizer
from ..adapters.bank import AdapterBank
from ..adapters.combine import read_stack
from ..baselines import NaiveBayes, majority_label
from ..data.chat import ChatTemplate, split_answer
from ..data.records import SUFFIXES, Message, Record, read_all
from ..data.templates import template_source
from ..loading import check_finite, check_token_ids, load_model
from .likelihood import Progress
from .options import MAX_LABELS, EvalOptions
from .records import answer_figures, evaluate_records

BASE = "base"  # the row of the bare base in a comparison


def run_evaluate(
    base: Path | str,
    data: Path | str | Sequence[Path | str],
    *,
    adapter: Path | str | None = None,
    limit: int | None = None,
    dtype: str = "float32",
    device: str = "auto",
    progress: Progress | None = None,
    **options: Any,  # fields of EvalOptions
) -> dict[str, Any]:
    """Score a base, or a base with an adapter, on records (files, folders, globs) or a text file; returns named figures.

    Raises ValueError or OSError for bad input, with every bad row in one message.
    """
    adapters = {} if adapter is None else {"evaluated": adapter}
    [figures] = compare(
        base, data, adapters, with_base=adapter is None, limit=limit, dtype=dtype, device=device, progress=progress,
        **options,
    ).values()  # fmt: skip
    return figures


def compare(
    base: Path | str,
    data: Path | str | Sequence[Path | str],
    adapters: Mapping[str, Path | str],
    *,
    with_base: bool = True,
    limit: int | None = None,
    dtype: str = "float32",
    device: str = "auto",
    baselines: Path | str | None = None,  # training records: what their labels and words alone give
    progress: Progress | None = None,
    **options: Any,
) -> dict[str, dict[str, Any]]:
    """`run_evaluate` for the bare base (under the name `base`) and several adapters on the same records, loaded once.

    With `baselines` two more: `majority`, the commonest answer of those training records, and `words`, naive Bayes over
    their prompts' words. Raises ValueError where they have more answers than a classification.
    """
    chosen = EvalOptions(**options)
    specs = [data] if isinstance(data, Path | str) else list(data)
    check_request(adapters, with_base=with_base, limit=limit)
    if taken := {"majority", "words"} & set(adapters) if baselines is not None else set():
        raise ValueError(f"adapter name {min(taken)!r} is a baseline's here; choose another")
    device = resolve_device(device)
    bank, tokenizer = load_bank(base, adapters, dtype=dtype, device=device)
    records = _read(specs, tokenizer, chosen.fields)[:limit]
    found = word_baselines(read_all([baselines], chosen.fields), records, chosen) if baselines is not None else {}
    for name in each_in_turn(bank, adapters, with_base=with_base):
        adapter = bank.adapters[name] if name != BASE else None
        source = template_source(chosen.chat_template) if chosen.chat_template else adapter and adapter.chat_template
        args = chosen.template_args if chosen.template_args is not None else adapter and adapter.template_args
        template = ChatTemplate.of(tokenizer, source, args=args)
        found[name] = evaluate_records(
            bank.model, tokenizer, records, template, options=chosen, device=device, progress=progress
        )
    return found


def word_baselines(
    train: Sequence[Record], records: Sequence[Record], options: EvalOptions
) -> dict[str, dict[str, Any]]:
    """What a reader gets right who knows the commonest answer, and one who counts words (baselines.py)."""
    pairs = [split_answer(record) for record in train if record.empty is None]
    labels = [answer.strip() for _, answer in pairs]
    if len(set(labels)) > MAX_LABELS:
        raise ValueError(
            f"--baselines is about few answers; the training records have {len(set(labels)):,} distinct ones (at most "
            f"{MAX_LABELS})"
        )
    counted = NaiveBayes([_prompt_text(prompt) for prompt, _ in pairs], labels)
    asked = [split_answer(record) for record in records if record.empty is None]
    truth = [answer.strip() for _, answer in asked]
    predicted = {
        "majority": [majority_label(labels)] * len(truth),
        "words": [counted.predict(_prompt_text(prompt)) for prompt, _ in asked],
    }
    return {
        name: {"n_records": len(truth), **answer_figures(truth, answers, replace(options, metrics=()))}
        for name, answers in predicted.items()
    }


def _prompt_text(prompt: str | Sequence[Message]) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(str(message["content"]) for message in prompt)


def check_request(adapters: Mapping[str, Path | str], *, with_base: bool, limit: int | None) -> None:
    """Raise ValueError for a limit below 1 and for an adapter that has the base's name."""
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} must be >= 1; leave it out to score every record")
    if with_base and BASE in adapters:
        raise ValueError(f"adapter name {BASE!r} is the bare base's here; choose another")


def load_bank(
    base: Path | str, adapters: Mapping[str, Path | str], *, dtype: str, device: str
) -> tuple[AdapterBank, Tokenizer]:
    """The base with every adapter loaded. Raises ValueError for weights or tokens that no figure could be made with."""
    model, tokenizer = load_model(base, dtype=dtype, device=device), Tokenizer.load(base)
    check_token_ids(tokenizer, model.config, where=base)
    check_finite(model, where=base)
    bank = AdapterBank(model)
    for name, folder in adapters.items():
        bank.add(name, read_stack(folder))
    return bank, tokenizer


def each_in_turn(bank: AdapterBank, names: Mapping[str, object], *, with_base: bool) -> Iterator[str]:
    """The names, `base` first where it is wanted; while a name is out, that adapter (or none) acts."""
    for name in [*([None] if with_base else []), *names]:
        bank.use(name)
        yield name if name is not None else BASE


def _read(specs: Sequence[Path | str], tokenizer: Tokenizer, fields: Mapping[str, str] | None) -> list[Record]:
    """Records; or, of one file that isn't of their types, its documents."""
    if len(specs) == 1:
        file = Path(specs[0])
        suffix = Path(file.stem).suffix if file.suffix == ".gz" else file.suffix
        if file.is_file() and suffix.lower() not in SUFFIXES:
            return _documents(file, tokenizer)
    return read_all(specs, fields)


def _documents(file: Path, tokenizer: Tokenizer) -> list[Record]:
    """A text file's documents, cut where it spells the end-of-text token."""
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.token_bytes(tokenizer.eos_token_id).decode()]
    texts = [b""]
    for piece in read_documents([file], separators=eos):
        texts[-1] += piece.data
        if piece.ends:
            texts.append(b"")
    return [Record(f"{file} document {i}", text=text.decode()) for i, text in enumerate(texts, 1) if text]
