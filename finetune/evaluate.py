"""`graft eval`: loss, and for records with an answer how many are right, by what the model writes or by its likelihoods."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from ..base.device import resolve_device
from ..base.evaluate import bits_per_byte, mean_loss
from ..base.generate.sampling import Sampling
from ..base.model.transformer import Transformer
from ..base.text.documents import read_documents
from ..base.tokenizer.tokenizer import Tokenizer
from .adapters.bank import AdapterBank
from .adapters.combine import read_stack
from .data.chat import ChatTemplate, encode_prompt, encode_whole, split_answer
from .data.dataset import DatasetOptions, encode_dataset
from .data.packing import collate_padded
from .data.records import SUFFIXES, Record, join_errors, read_all
from .data.templates import template_source
from .generate import generate_rows, start_ids
from .loading import check_finite, check_token_ids, load_model

Score = Literal["exact", "likelihood"]
MAX_LABELS = 20  # so few distinct answers are classes, and F1 is given
BASE = "base"  # the row of the bare base in a comparison
LOGITS = 1 << 26  # numbers of logits at once, 256 MiB in float32


@dataclass(frozen=True)
class EvalOptions:
    """How records are read and scored. Raises ValueError for an unknown choice."""

    # exact: the greedy answer equals the record's; likelihood: the record's answer is the most probable of all answers
    score: Score = "exact"
    on_too_long: str = "error"  # records whose prompt leaves no room for an answer: error (all are listed), or drop
    on_empty: str = "error"  # records with a null or empty answer or text: error (all are listed), or drop
    special_tokens: str = "text"  # what a special token that the data spells is: plain text, or the token
    fields: Mapping[str, str] | None = None  # other field names of the rows
    chat_template: str | None = None  # a name or a file; None: the adapter's, else the base's
    template_args: Mapping[str, Any] | None = None  # None: those of training
    batch_size: int = 32

    def __post_init__(self) -> None:
        for name, known in (("score", get_args(Score)), ("on_too_long", ("error", "drop"))):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"--{name.replace('_', '-')} {getattr(self, name)!r} is unknown; choose {', '.join(known)}"
                )
        self.dataset  # noqa: B018 (raises for an unknown choice)

    @property
    def dataset(self) -> DatasetOptions:
        """The same choices for `encode_dataset`; texts become windows."""
        return DatasetOptions("auto", self.on_empty, self.special_tokens)  # pyright: ignore[reportArgumentType]


Progress = Callable[[int, int], None]  # called with (records done, all)


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
    progress: Progress | None = None,
    **options: Any,
) -> dict[str, dict[str, Any]]:
    """`run_evaluate` for the bare base (under the name `base`) and several adapters on the same records, loaded once."""
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} must be >= 1; leave it out to score every record")
    if with_base and BASE in adapters:
        raise ValueError(f"adapter name {BASE!r} is the bare base's here; choose another")
    chosen = EvalOptions(**options)
    specs = [data] if isinstance(data, Path | str) else list(data)
    device = resolve_device(device)
    model, tokenizer = load_model(base, dtype=dtype, device=device), Tokenizer.load(base)
    check_token_ids(tokenizer, model.config, where=base)
    check_finite(model, where=base)
    bank = AdapterBank(model)
    for name, folder in adapters.items():
        bank.add(name, read_stack(folder))
    records = _read(specs, tokenizer, chosen.fields)[:limit]
    found = {}
    for name in [*([None] if with_base else []), *adapters]:
        bank.use(name)
        adapter = bank.adapters[name] if name is not None else None
        source = template_source(chosen.chat_template) if chosen.chat_template else adapter and adapter.chat_template
        args = chosen.template_args if chosen.template_args is not None else adapter and adapter.template_args
        template = ChatTemplate.of(tokenizer, source, args=args)
        found[name or BASE] = evaluate_records(
            model, tokenizer, records, template, options=chosen, device=device, progress=progress
        )
    return found


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
    they are few, F1.

    With the bank's active adapter, if the model has one. Texts longer than the model are cut into windows. Raises
    ValueError that lists every empty row, row without an answer and prompt without room, where the options don't drop them.
    """
    options = options or EvalOptions(batch_size=batch_size)
    whole = [record for record in records if record.empty is None]
    if not records or (whole and all(record.text is not None for record in whole)):
        return _text_figures(model, tokenizer, records, options, device)
    kept, counts = _usable(model, tokenizer, records, template, options)
    special = options.dataset.special_tokens
    encoded = [encode_whole(record, tokenizer, template, special_tokens=special) for record in kept]
    encoded = [
        type(e)(e.ids[: model.config.max_seq_len + 1], e.loss_mask[: model.config.max_seq_len + 1]) for e in encoded
    ]
    size = options.batch_size
    batches = [collate_padded(encoded[i : i + size]) for i in range(0, len(encoded), size)]
    answers = [split_answer(record)[1].strip() for record in kept]
    if options.score == "likelihood":
        written = most_likely(model, tokenizer, kept, template, options=options, progress=progress)
    else:
        written = write_answers(model, tokenizer, kept, template, batch_size=size, options=options, progress=progress)
    n_correct = sum(a == b for a, b in zip(answers, written, strict=True))
    low, high = wilson_interval(n_correct, len(kept))
    n_labels = sum(int(e.loss_mask[1:].sum()) for e in encoded)
    figures: dict[str, Any] = {
        "n_records": len(kept),
        **{name: count for name, count in counts.items() if count},
        **_loss_figures(mean_loss(model, batches, device=device), n_labels, sum(map(_learned_bytes, kept))),
        "score": options.score,
        "n_correct": n_correct,
        "accuracy": n_correct / len(kept),
        "accuracy_low": low,
        "accuracy_high": high,
    }
    if len(set(answers)) <= MAX_LABELS:
        scores = f1_scores(answers, written)
        figures["f1_macro"] = sum(scores.values()) / len(scores)
        figures |= {f"f1_{label}": score for label, score in scores.items()}
    return figures


def _usable(
    model: Transformer,
    tokenizer: Tokenizer,
    records: Sequence[Record],
    template: ChatTemplate | None,
    options: EvalOptions,
) -> tuple[list[Record], dict[str, int]]:
    """The records that can be scored, and how many can't; raises ValueError that lists those, where they aren't dropped."""
    counts = {"n_empty": 0, "n_too_long": 0}
    bad: list[str] = []
    answered: list[Record] = []
    for record in records:
        if record.empty is None:
            try:
                split_answer(record)
                answered.append(record)
            except ValueError as error:
                bad.append(str(error))
        elif options.on_empty == "drop":
            counts["n_empty"] += 1
        else:
            bad.append(f"{record.where}: {record.empty} (--on-empty drop leaves such rows out)")
    prompts, errors = _prompts(tokenizer, answered, template, options)
    bad += errors
    room = _room(tokenizer, answered)
    kept = []
    for record, prompt in zip(answered, prompts, strict=True):
        if prompt is None or len(prompt) + room <= model.config.max_seq_len:
            kept.append(record)
        elif options.on_too_long == "drop":
            counts["n_too_long"] += 1
        else:
            hint = " (--on-too-long drop leaves such rows out)"
            bad.append(_no_room(record, len(prompt), room, model.config.max_seq_len) + hint)
    if bad:
        raise ValueError(join_errors(bad))
    if not kept:
        raise ValueError(
            f"none of the {len(records):,} records is left to score ({counts['n_empty']:,} empty, "
            f"{counts['n_too_long']:,} too long); check the data"
        )
    return kept, counts


def _prompts(
    tokenizer: Tokenizer, records: Sequence[Record], template: ChatTemplate | None, options: EvalOptions
) -> tuple[list[list[int] | None], list[str]]:
    """The ids before each record's answer, None where the template refuses them, and what it says then."""
    prompts: list[list[int] | None] = []
    errors = []
    for record in records:
        prompt, _ = split_answer(record)
        try:
            ids = encode_prompt(
                prompt, tokenizer, template, tools=record.tools, args=record.template_args,
                special_tokens=options.dataset.special_tokens,
            )  # fmt: skip
            prompts.append(start_ids(ids.tolist(), tokenizer))
        except ValueError as error:
            prompts.append(None)
            errors.append(f"{record.where}: {error}")
    return prompts, errors


def _room(tokenizer: Tokenizer, records: Sequence[Record]) -> int:
    """Tokens that an answer may take: the longest true one's and two, so that going on is not cut to a right answer."""
    return max((len(tokenizer.encode(split_answer(record)[1])) for record in records), default=0) + 2


def _no_room(record: Record, n_prompt: int, room: int, limit: int) -> str:
    return (
        f"{record.where}: the prompt has {n_prompt} tokens and the answers need {room}, but the model reads {limit}; "
        "shorten it, or leave it out"
    )


def write_answers(
    model: Transformer,
    tokenizer: Tokenizer,
    records: Sequence[Record],
    template: ChatTemplate | None,
    *,
    batch_size: int = 32,
    adapters: Sequence[str | None] | None = None,  # for each record, from the model's bank
    options: EvalOptions | None = None,
    progress: Progress | None = None,
) -> list[str]:
    """The greedy answer to each record's prompt, stripped. Room is given for the longest true answer and two tokens.

    Raises ValueError that lists the prompts without that room.
    """
    prompts, bad = _prompts(tokenizer, records, template, options or EvalOptions())
    room, limit = _room(tokenizer, records), model.config.max_seq_len
    bad += [
        _no_room(record, len(prompt), room, limit)
        for record, prompt in zip(records, prompts, strict=True)
        if prompt is not None and len(prompt) + room > limit
    ]
    if bad:
        raise ValueError(join_errors(bad))
    ids = [prompt for prompt in prompts if prompt is not None]
    written = [""] * len(records)
    order = sorted(range(len(records)), key=lambda i: len(ids[i]))  # rows of like length waste no padding
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        texts = generate_rows(
            model,
            tokenizer,
            [ids[i] for i in rows],
            Sampling(max_new_tokens=room),
            template=template,
            adapters=[adapters[i] for i in rows] if adapters is not None else None,
        )
        for i, text in zip(rows, texts, strict=True):
            written[i] = text.strip()
        if progress is not None:
            progress(min(start + batch_size, len(records)), len(records))
    return written


# --- likelihood ----------------------------------------------------------------------------------------------------


def most_likely(
    model: Transformer,
    tokenizer: Tokenizer,
    records: Sequence[Record],
    template: ChatTemplate | None,
    *,
    options: EvalOptions | None = None,
    progress: Progress | None = None,
) -> list[str]:
    """For each record the answer, of all that stand in the records, whose tokens are most probable after its prompt.

    log p(answer | prompt) is the sum over the answer's tokens, without an end token, as lm-evaluation-harness's `acc` has
    it: a base that never saw the format is asked what it knows, not whether it stops in time. Raises ValueError for more
    than MAX_LABELS answers, and for two that have the same tokens.
    """
    options = options or EvalOptions(score="likelihood")
    labels = sorted({split_answer(record)[1] for record in records})
    if len(labels) > MAX_LABELS:
        raise ValueError(
            f"--score likelihood compares few answers, the records have {len(labels):,} distinct ones (at most {MAX_LABELS}); "
            "use --score exact"
        )
    encoded = [tokenizer.encode(label).tolist() for label in labels]
    if len({tuple(ids) for ids in encoded}) < len(labels):
        raise ValueError(
            f"the tokenizer can't tell the answers {', '.join(map(repr, labels))} apart; rename the labels"
        )
    prompts, bad = _prompts(tokenizer, records, template, options)
    if bad:
        raise ValueError(join_errors(bad))
    rows = [(prompt or [], label) for prompt in prompts for label in encoded]
    scores = [0.0] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]) + len(rows[i][1]))
    done = 0
    while done < len(order):
        longest = len(rows[order[min(done + options.batch_size, len(order)) - 1]][0]) + max(map(len, encoded))
        n_rows = max(1, min(options.batch_size, LOGITS // (longest * model.config.vocab_size)))
        chosen = order[done : done + n_rows]
        for i, score in zip(chosen, answer_log_probabilities(model, [rows[i] for i in chosen]), strict=True):
            scores[i] = score
        done += len(chosen)
        if progress is not None:
            progress(done // len(labels), len(records))
    n = len(labels)
    best = [max(range(n), key=lambda k, start=start: scores[start + k]) for start in range(0, len(rows), n)]
    return [labels[k].strip() for k in best]


@torch.inference_mode()
def answer_log_probabilities(model: Transformer, rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[float]:
    """log p(answer | prompt) in nats, summed over the answer's tokens, of each (prompt, answer) in one batch."""
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    device = model.model.embed_tokens.weight.device
    ids = torch.zeros(len(rows), width, dtype=torch.int64)  # padded on the right, where causality hides it
    counted = torch.zeros(len(rows), width - 1, dtype=torch.bool)
    for row, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor([*prompt, *answer])
        counted[row, len(prompt) - 1 : end - 1] = True
    ids = ids.to(device)
    logits = model(ids[:, :-1]).float()  # (B, T, V)
    chosen = logits.gather(-1, ids[:, 1:, None])[..., 0] - logits.logsumexp(-1)  # (B, T)
    return chosen.masked_fill(~counted.to(device), 0.0).sum(-1).tolist()


# --- figures -------------------------------------------------------------------------------------------------------


def f1_scores(truth: Sequence[str], predicted: Sequence[str]) -> dict[str, float]:
    """F1 = 2 TP / (2 TP + FP + FN) of each label that occurs in the truth."""
    hits = Counter(t for t, p in zip(truth, predicted, strict=True) if t == p)
    in_truth, in_predicted = Counter(truth), Counter(predicted)
    return {label: 2 * hits[label] / (in_truth[label] + in_predicted[label]) for label in sorted(in_truth)}


def wilson_interval(n_correct: int, n: int, *, z: float = 1.959964) -> tuple[float, float]:
    """The 95% interval of a share of n trials (Wilson 1927): right also near 0 and 1. Raises ValueError for n < 1.

    Of 10 right in 10 trials: 0.722 to 1.
    """
    if n < 1 or not 0 <= n_correct <= n:
        raise ValueError(f"{n_correct} of {n} is no share; n must be >= 1")
    share = n_correct / n
    middle = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low, high = (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)
    return (0.0 if n_correct == 0 else low), (1.0 if n_correct == n else high)


def _loss_figures(loss: float, n_labels: int, n_bytes: int) -> dict[str, float]:
    perplexity = math.exp(min(loss, 700))  # beyond, a float overflows
    return {
        "loss": loss,
        "perplexity": perplexity,
        "bits_per_byte": bits_per_byte(loss, n_tokens=n_labels, n_bytes=n_bytes),
    }


def _learned_bytes(record: Record) -> int:
    """Bytes of the record's answers: what its labels, less the end tokens, spell."""
    if record.messages is None:
        return max(1, len((record.completion or "").encode()))
    turns = record.messages[record.n_prompt_messages :]
    return max(1, sum(len(str(turn["content"]).encode()) for turn in turns if turn["role"] == "assistant"))


def _text_figures(
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
        **_loss_figures(loss, report.n_labels, n_bytes),
    }


__all__ = [
    "BASE", "EvalOptions", "answer_log_probabilities", "compare", "evaluate_records", "f1_scores", "most_likely",
    "run_evaluate", "wilson_interval", "write_answers",
]  # fmt: skip
