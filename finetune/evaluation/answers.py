"""What a model answers to records: one greedy answer each, or several samples and pass@k."""

from collections.abc import Sequence
from dataclasses import replace

from ...base.generate.sampling import Sampling
from ...base.model.transformer import Transformer
from ...base.tokenizer.tokenizer import Tokenizer
from ..data.chat import ChatTemplate, split_answer
from ..data.records import Record
from ..generate import generate_rows
from .likelihood import Progress
from .metrics import bounded_mean, share
from .options import EvalOptions
from .prompts import fitting_prompts


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
    options = options or EvalOptions()
    ids, room = fitting_prompts(model.config.max_seq_len, tokenizer, records, template, options)
    return write_texts(
        model, tokenizer, ids, Sampling(max_new_tokens=room), template=template, batch_size=batch_size,
        adapters=adapters, progress=progress,
    )  # fmt: skip


def write_texts(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling | Sequence[Sampling],  # for all, or one for each prompt
    *,
    template: ChatTemplate | None = None,
    batch_size: int = 32,
    adapters: Sequence[str | None] | None = None,
    progress: Progress | None = None,
) -> list[str]:
    """What is written after each prompt, stripped, in the prompts' order; prompts of like length are read together."""
    written = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        texts = generate_rows(
            model,
            tokenizer,
            [prompts[i] for i in rows],
            sampling if isinstance(sampling, Sampling) else [sampling[i] for i in rows],
            template=template,
            adapters=[adapters[i] for i in rows] if adapters is not None else None,
        )
        for i, text in zip(rows, texts, strict=True):
            written[i] = text.strip()
        if progress is not None:
            progress(min(start + batch_size, len(prompts)), len(prompts))
    return written


def sample_figures(
    model: Transformer,
    tokenizer: Tokenizer,
    records: Sequence[Record],
    template: ChatTemplate | None,
    *,
    options: EvalOptions,
    progress: Progress | None = None,
) -> dict[str, float]:
    """pass@k of `options.n_samples` samples a record, and how often their majority is right.

    A sample is right where the reward `options.verify` gives 1. pass@k is the mean over records of Chen et al. 2021's
    unbiased estimator (arXiv:2107.03374, eq. 1), its interval the mean's; the majority votes over the samples' final
    answers (self-consistency, arXiv:2203.11171), and is right where the first sample with that answer is.
    """
    from ..align.arena import majority_vote, pass_at_k
    from ..align.rewards import final_answer, find_reward

    ids, room = fitting_prompts(model.config.max_seq_len, tokenizer, records, template, options)
    n, reward = options.n_samples, find_reward(options.verify)
    sampling = options.sampling(room)
    # Sample j of record i has a seed of its own, whatever the batches.
    texts = write_texts(
        model, tokenizer, [prompt for prompt in ids for _ in range(n)],
        [replace(sampling, seed=options.seed + i) for i in range(len(ids) * n)],
        template=template, batch_size=options.batch_size, progress=progress,
    )  # fmt: skip
    n_right, majority = [], []
    for i, record in enumerate(records):
        answer, mine = split_answer(record)[1], texts[i * n : (i + 1) * n]
        right = [reward("", text, {"completion": answer}) == 1 for text in mine]
        n_right.append(sum(right))
        votes = [final_answer(text) for text in mine]
        majority.append(right[votes.index(majority_vote(votes))])
    figures: dict[str, float] = {"n_samples": n}
    for k in options.ks:
        figures |= bounded_mean(f"pass@{k}", [pass_at_k(n, c, k) for c in n_right])
    return figures | share("majority", majority)
