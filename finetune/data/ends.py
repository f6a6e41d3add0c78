"""What a chat template writes around an assistant's turn: the tokens that end it and those that open the next one."""

from collections.abc import Callable, Sequence
from functools import lru_cache

from ...base.tokenizer.tokenizer import Tokenizer
from .marks import template_specials
from .records import Message
from .render import ChatTemplate

_PROBE = "qxprobe"
USER: Message = {"role": "user", "content": "graft"}
_ANSWER: Message = {"role": "assistant", "content": _PROBE}

Render = Callable[[Sequence[object], bool], str]  # (turns, with a generation prompt) -> text


@lru_cache(maxsize=64)
def end_of_turn_spelling(tokenizer: Tokenizer, template: ChatTemplate) -> str | None:
    """The special token that the template puts right after the assistant's words (white space may stand between)."""
    for turns in ([USER, _ANSWER], [{"role": "system", "content": "graft"}, USER, _ANSWER], [_ANSWER]):
        if after := _after_probe(template, turns):
            return _first_special(after, tokenizer)
    return None


@lru_cache(maxsize=64)
def ends_of_turn(tokenizer: Tokenizer, template: ChatTemplate) -> tuple[frozenset[str], str]:
    """(what may end an assistant's turn, special tokens that follow the end without a gap when nobody speaks after it).

    gpt-oss ends the last turn with <|return|> and the ones before with <|end|>; Cohere 2 writes <|END_OF_TURN_TOKEN|> right
    after <|END_RESPONSE|>. What ends a turn in between is the same whoever speaks next, and never a token that opens a turn.
    """
    last = end_of_turn_spelling(tokenizer, template)
    if last is None:
        return frozenset(), ""
    specials = tuple(tokenizer.special_tokens)
    rest = (_after_probe(template, [USER, _ANSWER]) or "").partition(last)[2]
    n_more = 0
    for match in template_specials(rest, specials):
        if match.start() != n_more:
            break
        n_more = match.end()
    header = header_of(lambda turns, prompt: template.render_marked(turns, None, prompt), [USER])
    opening = {match.group() for match in template_specials(header, specials)}
    next_turns: list[Message] = [USER, {"role": "assistant", "content": "graft"}]
    followed = [_after_probe(template, [USER, _ANSWER, turn]) for turn in next_turns]
    between = {_first_special(after, tokenizer) if after else None for after in followed}
    ends = {last} | {end for end in between if end is not None and len(between) == 1 and end not in opening}
    return frozenset(ends), rest[:n_more]


def _after_probe(template: ChatTemplate, turns: Sequence[Message]) -> str | None:
    """What the template writes after the words of _ANSWER; None where it refuses the turns or drops the words."""
    try:
        text = template.render(turns)
    except ValueError:
        return None
    return text.rpartition(_PROBE)[2] if _PROBE in text else None


def _first_special(text: str, tokenizer: Tokenizer) -> str | None:
    """The special token that the text starts with, white space aside."""
    match = next(template_specials(text, tuple(tokenizer.special_tokens)), None)
    return match.group() if match and not text[: match.start()].strip() else None


def header_of(render: Render, *beginnings: Sequence[object]) -> str:
    """What the template writes to open an assistant's turn, after the first of the beginnings where it can be told."""
    for turns in beginnings:
        try:
            closed, opened = render(turns, False), render(turns, True)
        except ValueError:
            continue
        if opened.startswith(closed) and len(opened) > len(closed):
            return opened[len(closed) :]
    return ""


@lru_cache(maxsize=64)
def openers(tokenizer: Tokenizer, template: ChatTemplate) -> frozenset[str]:
    """Special tokens that open a user's turn: the search for an assistant's end never passes them."""
    try:
        opening = template.render([{"role": "user", "content": _PROBE}]).partition(_PROBE)[0]
    except ValueError:
        return frozenset()
    return frozenset(match.group() for match in template_specials(opening, tuple(tokenizer.special_tokens)))
