"""Records -> ids and loss mask: the one way graft turns a turn to tokens, in training as at inference.

Text is cut at every mark (marks.py) before encoding, so a prompt has the same tokens in training and at inference,
whatever the answer's first characters would have merged with.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ...base.tokenizer.tokenizer import Tokenizer
from .ends import end_of_turn_spelling
from .marks import encode_marked, special_pattern
from .masks import mark_conversation
from .messages import Message
from .record import Record
from .render import ChatTemplate, spelling
from .templates import CHATML, PLAIN

__all__ = [
    "CHATML", "PLAIN", "ChatTemplate", "Encoded", "SpecialTokens", "encode_prompt", "encode_record", "encode_whole",
    "end_of_turn",
    "n_spelled_specials", "split_answer", "unwritten",
]  # fmt: skip

# What a special token that the data spells becomes: plain text, or the token itself (for rows rendered beforehand).
SpecialTokens = Literal["text", "tokens"]


@dataclass(frozen=True, eq=False)
class Encoded:
    """A record as the model sees it."""

    ids: np.ndarray  # (n,) int32
    loss_mask: np.ndarray  # (n,) bool: this token is a label (it is predicted from those before it)


def encode_record(
    record: Record,
    tokenizer: Tokenizer,
    template: ChatTemplate | None,  # None: ChatTemplate.of(tokenizer)
    max_seq_len: int,  # in tokens; what is beyond is cut off
    *,
    special_tokens: SpecialTokens = "text",
) -> Encoded:
    """Ids and loss mask of one record, cut to `max_seq_len`; dataset.py has other ways to treat long ones.

    text: [BOS] text EOS, all learned. prompt + completion: [BOS] prompt completion EOS, loss on completion and EOS, no
    chat template; the two are encoded apart, as at inference. messages: the template's text, loss on the assistant's
    turns and their end-of-turn token (EOS is added after the last turn where the template ends it with no special
    token). BOS stands before a string if the tokenizer asks for it; before a conversation the template alone decides.
    Special tokens spelled in the data are plain text; in the assistant's own words this is so for control tokens only,
    not for such as <think>, which it is to write.

    Raises ValueError naming the row when nothing is left to learn, or when the template cannot be followed.
    """
    whole = encode_whole(record, tokenizer, template, special_tokens=special_tokens)
    if not whole.loss_mask[1:max_seq_len].any():
        n_prompt = int(whole.loss_mask.argmax())
        raise ValueError(
            f"{record.where}: no label is left after truncation to max_seq_len={max_seq_len}, as the prompt alone has "
            f"{n_prompt} tokens; raise max_seq_len to {len(whole.ids)} if the base reads so many, or shorten or drop the row"
        )
    return Encoded(whole.ids[:max_seq_len], whole.loss_mask[:max_seq_len])


def encode_whole(
    record: Record,
    tokenizer: Tokenizer,
    template: ChatTemplate | None = None,  # None: ChatTemplate.of(tokenizer)
    *,
    special_tokens: SpecialTokens = "text",
) -> Encoded:
    """`encode_record` without a limit."""
    try:
        if record.empty is not None:
            raise ValueError(f"{record.empty}; fill it, or drop the row")
        if record.is_preference:
            raise ValueError(
                "this row holds preferences (chosen, rejected or a label); train on it with graft dpo, "
                "or give the good answer as completion"
            )
        if record.messages is None:
            ids, mask = _encode_strings(record, tokenizer, special_tokens)
        else:
            template = template or ChatTemplate.of(tokenizer)
            ids, mask = _encode_messages(record, tokenizer, template, special_tokens)
    except ValueError as error:
        raise ValueError(f"{record.where}: {error}") from None
    except RecursionError:
        raise ValueError(f"{record.where}: its values are nested too deeply; flatten them") from None
    return Encoded(ids, mask)


def encode_prompt(
    prompt: str | Sequence[Message],
    tokenizer: Tokenizer,
    template: ChatTemplate | None = None,  # for messages; None: ChatTemplate.of(tokenizer)
    *,
    tools: Sequence[dict] | None = None,
    args: Mapping[str, Any] | None = None,  # the row's own template arguments
    special_tokens: SpecialTokens = "text",
) -> np.ndarray:  # (n,) int32
    """The ids that generation starts from: exactly those that stand before the answer in `encode_record`."""
    if isinstance(prompt, str):
        return _encode_text(prompt, tokenizer, special_tokens)
    template = template or ChatTemplate.of(tokenizer)
    marked = mark_conversation(
        prompt,
        tools,
        tokenizer,
        template,
        n_prompt=len(prompt),
        add_generation_prompt=True,
        args=args,
        guarded=special_tokens == "text",
    )
    return encode_marked(marked, tokenizer)[0]


def end_of_turn(tokenizer: Tokenizer, template: ChatTemplate | None = None) -> int:
    """The id that ends the assistant's turn: the first special token that the template writes after it, else EOS.

    Generation stops here. Raises ValueError when there is neither.
    """
    found = end_of_turn_spelling(tokenizer, template or ChatTemplate.of(tokenizer))
    return tokenizer.special_tokens[found] if found else _eos(tokenizer)


def split_answer(record: Record) -> tuple[str | tuple[Message, ...], str]:
    """(prompt, answer) of a record, for evaluation: the last assistant turn is the answer. Raises ValueError without one."""
    if record.prompt is not None and record.completion is not None:
        return record.prompt, record.completion
    if record.messages and record.messages[-1]["role"] == "assistant":
        return record.messages[:-1], str(record.messages[-1]["content"])
    raise ValueError(
        f"{record.where}: no answer to compare with; give prompt and completion, or end on an assistant turn"
    )


# --- strings -------------------------------------------------------------------------------------------------------


def _encode_strings(
    record: Record, tokenizer: Tokenizer, special_tokens: SpecialTokens
) -> tuple[np.ndarray, np.ndarray]:
    eos = _eos(tokenizer)
    answer = record.text if record.text is not None else record.completion
    if answer is None:
        raise ValueError("a prompt without a completion has nothing to learn; add the field completion")
    # An EOS that the data spells out at the very end is the one that is added here.
    answer = answer.removesuffix(spelling(tokenizer, eos) or "")
    if record.text is not None:
        prompt, learned = np.zeros(0, np.int32), _encode_text(answer, tokenizer, special_tokens)
    else:
        prompt = _encode_text(record.prompt or "", tokenizer, special_tokens)
        learned = tokenizer.encode(answer, allowed_special=_allowed(special_tokens))
    ids = np.concatenate([prompt, learned, [eos]]).astype(np.int32)
    return ids, np.arange(len(ids)) >= len(prompt)


def _allowed(special_tokens: SpecialTokens) -> Any:
    return "all" if special_tokens == "tokens" else frozenset()


def _encode_text(text: str, tokenizer: Tokenizer, special_tokens: SpecialTokens = "text") -> np.ndarray:
    """[BOS] text. A BOS that the data spells out at the very start becomes the token, and is never doubled."""
    bos = tokenizer.bos_token_id
    if bos is None:
        return tokenizer.encode(text, allowed_special=_allowed(special_tokens))
    plain = text.removeprefix(spelling(tokenizer, bos) or "")
    ids = tokenizer.encode(plain, allowed_special=_allowed(special_tokens))
    return np.concatenate([[bos], ids]).astype(np.int32) if tokenizer.add_bos or plain != text else ids


def _eos(tokenizer: Tokenizer) -> int:
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"the tokenizer has no EOS token, so the model can't learn to stop; train it with special tokens "
            f"(it has {list(tokenizer.special_tokens)}), or name eos_token in tokenizer_config.json"
        )
    return tokenizer.eos_token_id


# --- conversations -------------------------------------------------------------------------------------------------


def _encode_messages(
    record: Record, tokenizer: Tokenizer, template: ChatTemplate, special_tokens: SpecialTokens
) -> tuple[np.ndarray, np.ndarray]:
    messages = list(record.messages or ())
    answers = [message for message in messages[record.n_prompt_messages :] if message["role"] == "assistant"]
    if not answers:
        raise ValueError("no assistant turn to learn from; end the conversation with one, or give a completion")
    if all(message.get("train") is False for message in answers):
        raise ValueError("each assistant turn has train false (or weight 0), so nothing is learned; drop the row")
    marked = mark_conversation(
        messages,
        record.tools,
        tokenizer,
        template,
        n_prompt=record.n_prompt_messages,
        args=record.template_args,
        guarded=special_tokens == "text",
    )
    ids, mask = encode_marked(marked, tokenizer)
    if end_of_turn_spelling(tokenizer, template) is None and messages[-1]["role"] == "assistant":
        is_learned = messages[-1].get("train") is not False
        ids, mask = np.append(ids, np.int32(_eos(tokenizer))), np.append(mask, is_learned)
    return ids, mask


def n_spelled_specials(record: Record, tokenizer: Tokenizer) -> int:
    """How many control tokens the record's own strings spell; such as <think>, which a model may write, don't count."""
    names = tuple(token.content for token in tokenizer.definition.added if token.special)
    pattern = special_pattern(names)
    return sum(len(pattern.findall(text)) for text in _strings(record))


def unwritten(record: Record, template: ChatTemplate) -> list[str]:
    """What the record has and the template leaves out of the text: "reasoning" (of learned turns), "tools", or both.

    Many templates write no reasoning of earlier turns, on purpose.
    """
    turns = [m for m in (record.messages or ())[record.n_prompt_messages :] if m.get("train") is not False]
    thoughts = [str(turn["reasoning_content"]).strip() for turn in turns if turn.get("reasoning_content")]
    if not thoughts and not record.tools:
        return []
    text = template.render(record.messages or (), tools=record.tools, args=record.template_args)
    names = [str(tool.get("function", tool).get("name", "")) for tool in record.tools or ()]
    found = {"reasoning": all(thought in text for thought in thoughts), "tools": all(name in text for name in names)}
    return [what for what, is_written in found.items() if not is_written]


def _strings(record: Record) -> Iterator[str]:
    yield from (text for text in (record.text, record.prompt, record.completion) if text is not None)
    waiting: list[object] = list(record.messages or ())
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping):
            waiting += value.values()
        elif isinstance(value, list | tuple):
            waiting += value
