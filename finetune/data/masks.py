"""Which part of a rendered conversation carries loss: the assistant's words and the token that ends its turn, never more.

A template with generation tags says so itself. For one without tags the parts are found by rendering again:

    render(turns before i, with generation prompt)   where the assistant's turn i starts: what inference starts from
    render(all, each word marked with its owner)     whose word stands where, so that no other's falls into the turn
    the template's end-of-turn token                 where the turn ends, looked for only up to the next owner's words
    render(turns up to i)                            where the turn ends if no such token follows

Owner marks may disturb a template that looks at the words (a comparison, a length). Then fewer words are marked, and if
even that changes the text, only positions that follow from unmarked renderings alone are accepted.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from ...base.tokenizer.tokenizer import Tokenizer
from .marks import (
    LEARN_OFF,
    LEARN_ON,
    LITERAL_OFF,
    guard,
    hide,
    map_strings,
    own,
    read_owners,
    template_specials,
    without_learn,
)
from .messages import Message
from .render import ChatTemplate

_PROBE = "qxprobe"
_HOW = "put {% generation %} ... {% endgeneration %} around the assistant's part of the template"
_THOUGHT = re.compile(r"<think(?:ing)?>.*", re.DOTALL)
_NO_WORDS = ("role", "type", "id", "tool_call_id")  # keys whose values templates compare, and that nobody says

Render = Callable[[Sequence[object], bool], str]


@lru_cache(maxsize=64)
def end_of_turn_spelling(tokenizer: Tokenizer, template: ChatTemplate) -> str | None:
    """The special token that the template puts right after the assistant's words (white space may stand between)."""
    user: Message = {"role": "user", "content": "graft"}
    assistant: Message = {"role": "assistant", "content": _PROBE}
    for turns in ([user, assistant], [{"role": "system", "content": "graft"}, user, assistant], [assistant]):
        try:
            text = template.render(turns)
        except ValueError:
            continue
        if _PROBE not in text:
            continue
        after = text.rpartition(_PROBE)[2]
        match = next(template_specials(after, tuple(tokenizer.special_tokens)), None)
        return match.group() if match and not after[: match.start()].strip() else None
    return None


def mark_conversation(
    messages: Sequence[Message],
    tools: Sequence[dict] | None,
    tokenizer: Tokenizer,
    template: ChatTemplate,
    *,
    n_prompt: int = 0,  # the first messages, which carry no loss; nor do those with "train": False
    add_generation_prompt: bool = False,
    args: Mapping[str, Any] | None = None,  # the row's own template arguments
    guarded: bool = True,  # False: special tokens that the data spells are tokens
) -> str:
    """The rendered conversation with all marks set (marks.py).

    Raises ValueError when the template refuses the messages, or when the assistant's words can't be told from others.
    """
    names = tuple(tokenizer.special_tokens) if guarded else ()
    quiet = frozenset(i for i, message in enumerate(messages) if i < n_prompt or message.get("train") is False)
    messages = [{key: value for key, value in message.items() if key != "train"} for message in messages]
    hidden = [_guard_message(message, tokenizer) if guarded else map_strings(message, hide) for message in messages]
    hidden_tools = map_strings(tools, lambda text: guard(text, names))

    def render(turns: Sequence[object], prompt: bool) -> str:
        return template.render_marked(turns, hidden_tools, prompt, args)

    text = render(hidden, add_generation_prompt)
    if not any(message["role"] == "assistant" for message in messages):
        return without_learn(text)
    owners = _owners(hidden, text, render, add_generation_prompt)
    end = end_of_turn_spelling(tokenizer, template)
    _refuse_dropped(messages, owners, quiet)
    if template.has_generation_tags:
        if end:  # a template that closes its tag before the end-of-turn token: that token is learned all the same
            text = re.sub(f"{LEARN_OFF}({re.escape(end)})", lambda match: f"{match.group(1)}{LEARN_OFF}", text)
        return _check_tagged(text, messages, owners, quiet)
    finder = _Spans(hidden, text, owners, render, end, tokenizer, template)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            try:
                spans.append((i, *finder.span(i)))
            except ValueError:
                if i not in quiet:
                    raise  # else nothing of it is learned, wherever it stands
    for i, start, stop in reversed(spans):
        # turns without loss are cut at the same places, so that their ids are those they had when they were answers
        on, off = (LEARN_ON, LEARN_OFF) if i not in quiet else (LITERAL_OFF, LITERAL_OFF)
        text = f"{text[:start]}{on}{text[start:stop]}{off}{text[stop:]}"
    return text


def _owners(
    hidden: Sequence[Mapping[str, object]], text: str, render: Render, prompt: bool
) -> list[tuple[int, int]] | None:
    """(end of a character in the text, index of the message it came from) in the text's order; None if marks disturb."""
    for tags in (True, False):
        marked = [
            {key: value if key in _NO_WORDS else map_strings(value, lambda s: own(s, i, tags=tags)) for key, value in m.items()}  # noqa: B023
            for i, m in enumerate(hidden)
        ]  # fmt: skip
        try:
            plain, owners = read_owners(render(marked, prompt))
        except ValueError:
            continue
        if plain == text:
            return owners
    return None


def _refuse_dropped(messages: Sequence[Message], owners: list[tuple[int, int]] | None, quiet: frozenset[int]) -> None:
    """Raise ValueError where an assistant's turn has words and the text has none of them."""
    written = {owner for _, owner in owners or ()}
    for i, message in enumerate(messages):
        says = message["role"] == "assistant" and len(str(message["content"]).split()) > 0
        if owners is not None and says and i not in quiet and i not in written:
            raise ValueError(f"the chat template drops the assistant's words of message {i}; use another template")


def _check_tagged(
    text: str, messages: Sequence[Message], owners: list[tuple[int, int]] | None, quiet: frozenset[int]
) -> str:
    """The text of a tagged template; tags around turns without loss are taken off, around others' words refused.

    Owner positions count the marks that are in the text already.
    """
    characters = list(text)
    spans = list(re.finditer(f"{LEARN_ON}[^{LEARN_OFF}]*{LEARN_OFF}", text))
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if quiet and owners is None and len(spans) != len(turns):
        raise ValueError(
            "the chat template's generation tags can't be told apart, so turns without loss (the prompt's own, or those "
            "with train false) would be learned; give messages that are all learned"
        )
    for number, span in enumerate(spans):
        inside = {owner for at, owner in owners or () if span.start() < at <= span.end()}
        if others := [i for i in inside if messages[i]["role"] != "assistant"]:
            raise ValueError(
                f"the chat template's generation tags enclose words of message {min(others)} "
                f"({messages[min(others)]['role']}); they must enclose the assistant's part alone"
            )
        is_quiet = turns[number] in quiet if len(spans) == len(turns) else inside <= quiet
        if quiet and is_quiet:  # still cut here, so that the ids stay the same
            characters[span.start()], characters[span.end() - 1] = LITERAL_OFF, LITERAL_OFF
    return "".join(characters)


class _Spans:
    """Finds [start, stop) of the assistant's turns in the text of a template without generation tags."""

    def __init__(
        self,
        hidden: Sequence[Mapping[str, object]],
        text: str,
        owners: list[tuple[int, int]] | None,
        render: Render,
        end: str | None,
        tokenizer: Tokenizer,
        template: ChatTemplate,
    ):
        self.hidden, self.text, self.owners, self.render, self.end = hidden, text, owners, render, end
        self.specials = tuple(tokenizer.special_tokens)
        self.openers = _openers(tokenizer, template)

    def span(self, i: int) -> tuple[int, int]:
        low, first, last, high = self._neighbours(i)
        start = self._start(i, low, first)
        stop = self._stop(i, max(last, start), high)
        inside = [owner for at, owner in self.owners or () if start < at <= stop and owner != i]
        if inside or not start <= stop:
            raise ValueError(f"the chat template mixes message {i} with others, so its words can't be told; {_HOW}")
        return start, stop

    def _neighbours(self, i: int) -> tuple[int, int, int, int]:
        """(end of the last word of others before, first and last own word's place, start of the next other's word)."""
        text_end = len(self.text)
        if self.owners is None:
            return 0, text_end, 0, text_end
        own_places = [at for at, owner in self.owners if owner == i]
        if not own_places:  # nothing said, or the template drops it
            before = [at for at, owner in self.owners if owner < i]
            low = max(before, default=0)
            high = min((at - 1 for at, owner in self.owners if at > low), default=text_end)
            return low, high, low, high
        first, last = own_places[0], own_places[-1]
        low = max((at for at, owner in self.owners if owner != i and at < first), default=0)
        high = min((at - 1 for at, owner in self.owners if owner != i and at > first), default=text_end)
        return low, first - 1, last if last < high else first, high

    def _start(self, i: int, low: int, first: int) -> int:
        try:
            prompt = self.render(self.hidden[:i], True)
        except ValueError:  # a template that needs a user turn first
            prompt = ""
        if prompt and self.text.startswith(prompt) and (self.owners is None or low <= len(prompt) <= first):
            return len(prompt)
        if self.owners is not None:
            header = self._header(i)
            for part in dict.fromkeys((header, _THOUGHT.sub("", header))):  # a thinking block may be left out later
                # what inference starts from, thought opened or not, stands right before the turn's own words
                if part.strip() and (at := self.text.rfind(part, max(0, low - 1), first)) >= 0:
                    return at + len(part)
            if i and self.hidden[i - 1]["role"] == "assistant" and first < len(self.text):
                return first  # a template that joins two assistant turns to one: the second begins with its own words
        raise ValueError(
            f"the chat template writes earlier messages differently once message {i} follows, so its words can't be "
            f"told from the prompt; {_HOW}"
        )

    def _header(self, i: int) -> str:
        """What the template writes to open an assistant's turn."""
        user = [{"role": "user", "content": "graft"}]
        for turns in (self.hidden[:i], user):
            try:
                closed, opened = self.render(turns, False), self.render(turns, True)
            except ValueError:
                continue
            if opened.startswith(closed) and len(opened) > len(closed):
                return opened[len(closed) :]
        return ""

    def _stop(self, i: int, last: int, high: int) -> int:
        bound = high if self.owners is not None else self._turn_end(i, high, exact=True)
        if self.end:
            for match in template_specials(self.text, self.specials, last):
                if match.start() >= bound:
                    break
                if match.group() == self.end and match.end() <= bound:
                    return match.end()
                if self.owners is not None and match.group() in self.openers:
                    break
        return self._turn_end(i, bound, exact=self.owners is None)

    def _turn_end(self, i: int, high: int, *, exact: bool) -> int:
        """Where the text of the messages up to i ends: what later messages add can't be this turn's."""
        until = self.render(self.hidden[: i + 1], False)
        same = _common_prefix(until, self.text)
        if exact and same < len(until):
            raise ValueError(
                f"the chat template writes message {i} differently once others follow, so its end can't be told; {_HOW}"
            )
        for match in template_specials(self.text, self.specials):
            if match.start() < same < match.end():  # both go on with a special token, but not with the same one
                same = match.start()
        if same <= high:
            return same
        # Another's words come sooner, with whatever the template writes to open them: end with the own last word.
        own_places = [at for at, owner in self.owners or () if owner == i and at <= high]
        if not own_places:
            return self._start(i, *self._neighbours(i)[:2])
        last = own_places[-1]
        if not re.search(r"[<>\[\]]\S*\s*$", str(self.hidden[i].get("content", ""))):
            return last
        edge = min((m.start() for m in template_specials(self.text, self.specials, last)), default=high)
        space = re.compile(r"\s").search(self.text, last, high)  # such a last word carries no mark at its end
        return min(edge, space.start() if space else high, high)


@lru_cache(maxsize=64)
def _openers(tokenizer: Tokenizer, template: ChatTemplate) -> frozenset[str]:
    """Special tokens that open a user's turn: the search for an assistant's end never passes them."""
    try:
        opening = template.render([{"role": "user", "content": _PROBE}]).partition(_PROBE)[0]
    except ValueError:
        return frozenset()
    return frozenset(match.group() for match in template_specials(opening, tuple(tokenizer.special_tokens)))


def _common_prefix(a: str, b: str) -> int:
    n = min(len(a), len(b))
    if a[:n] == b[:n]:
        return n
    low, high = 0, n  # a[:low] == b[:low], a[:high] != b[:high]
    while high - low > 1:
        middle = (low + high) // 2
        if a[:middle] == b[:middle]:
            low = middle
        else:
            high = middle
    return low


def _guard_message(message: Message, tokenizer: Tokenizer) -> Mapping[str, object]:
    """Mark every special token that a message spells; the assistant may write those that are no control tokens."""
    assistant = message["role"] == "assistant"
    names = tuple(token.content for token in tokenizer.definition.added if token.special or not assistant)
    return {key: map_strings(value, lambda text: guard(text, names)) for key, value in message.items()}
