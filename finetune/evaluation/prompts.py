"""Records -> the ids that stand before their answers; which records can be scored, and which can't and why."""

from collections.abc import Sequence

from ...base.tokenizer.tokenizer import Tokenizer
from ..data.chat import ChatTemplate, encode_prompt, split_answer
from ..data.records import Record, join_errors
from ..generate import start_ids
from .options import EvalOptions


def usable(
    limit: int,  # tokens that the model reads
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
    prompts, errors = prompt_ids(tokenizer, answered, template, options)
    bad += errors
    room = answer_room(tokenizer, answered, options)
    kept = []
    for record, prompt in zip(answered, prompts, strict=True):
        if prompt is None or len(prompt) + room <= limit:
            kept.append(record)
        elif options.on_too_long == "drop":
            counts["n_too_long"] += 1
        else:
            bad.append(_no_room(record, len(prompt), room, limit) + " (--on-too-long drop leaves such rows out)")
    if bad:
        raise ValueError(join_errors(bad))
    if not kept:
        raise ValueError(
            f"none of the {len(records):,} records is left to score ({counts['n_empty']:,} empty, "
            f"{counts['n_too_long']:,} too long); check the data"
        )
    return kept, counts


def prompt_ids(
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


def fitting_prompts(
    limit: int, tokenizer: Tokenizer, records: Sequence[Record], template: ChatTemplate | None, options: EvalOptions
) -> tuple[list[list[int]], int]:
    """The ids before each answer, and the tokens that an answer may take. Raises ValueError that lists those without room."""
    prompts, bad = prompt_ids(tokenizer, records, template, options)
    room = answer_room(tokenizer, records, options)
    bad += [
        _no_room(record, len(prompt), room, limit)
        for record, prompt in zip(records, prompts, strict=True)
        if prompt is not None and len(prompt) + room > limit
    ]
    if bad:
        raise ValueError(join_errors(bad))
    return [prompt for prompt in prompts if prompt is not None], room


def answer_room(tokenizer: Tokenizer, records: Sequence[Record], options: EvalOptions) -> int:
    """Tokens that an answer may take: the longest true one's and two, so that going on is not cut to a right answer."""
    if options.max_new_tokens is not None:
        return options.max_new_tokens
    return max((len(tokenizer.encode(split_answer(record)[1])) for record in records), default=0) + 2


def _no_room(record: Record, n_prompt: int, room: int, limit: int) -> str:
    return (
        f"{record.where}: the prompt has {n_prompt} tokens and the answers need {room}, but the model reads {limit}; "
        "shorten it, or leave it out"
    )
