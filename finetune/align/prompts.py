"""Rows to answer: what GRPO and PPO sample from."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...base.tokenizer.tokenizer import Tokenizer
from ..data.chat import ChatTemplate, encode_prompt
from ..data.records import Record, read_rows
from ..generate import start_ids


@dataclass(frozen=True, eq=False)
class Prompt:
    """One row to answer."""

    ids: list[int]
    text: str  # as reward functions see it: the string, or the last turn
    row: dict[str, Any]  # every field of the file's row
    where: str
    is_chat: bool  # messages, which went through the chat template


def read_prompts(
    path: Path, tokenizer: Tokenizer, template: ChatTemplate | None, max_seq_len: int, max_new_tokens: int
) -> list[Prompt]:
    """The rows of a file as prompts; an answer that stands in a row is left for the rewards. Raises ValueError naming the row
    for one without a prompt, and for a prompt that leaves no room for max_new_tokens."""
    prompts = []
    for row, record in read_rows(path):
        turns, answer = prompt_of(record)
        arguments = {"tools": record.tools, "args": record.template_args}
        ids = start_ids(encode_prompt(turns, tokenizer, template, **arguments).tolist(), tokenizer)
        if len(ids) + max_new_tokens > max_seq_len:
            raise ValueError(
                f"{record.where}: the prompt has {len(ids)} tokens; with max_new_tokens={max_new_tokens} that is more than "
                f"max_seq_len={max_seq_len}; lower max_new_tokens, or shorten or drop the row"
            )
        text = turns if isinstance(turns, str) else str(turns[-1]["content"]) if turns else ""
        prompts.append(
            Prompt(
                ids,
                text,
                row if answer is None else row | {"completion": answer},
                record.where,
                record.messages is not None,
            )
        )
    if not prompts:
        raise ValueError(f"{path} holds no rows; give rows with a prompt (a string or messages)")
    return prompts


def prompt_of(record: Record) -> tuple[Any, str | None]:
    """(string or messages to answer, the answer that the row gives in messages)."""
    if record.prompt is not None:
        return record.prompt, None
    if not record.messages:
        raise ValueError(f"{record.where}: no prompt to answer; give the field prompt or messages")
    n = record.n_prompt_messages or len(record.messages) - (record.messages[-1]["role"] == "assistant")
    return record.messages[:n], str(record.messages[n]["content"]) if record.messages[n:] else None
