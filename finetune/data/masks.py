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
from collections.abc import Mapping, Sequence
from typing import Any

from ...base.tokenizer.tokenizer import Tokenizer
from .ends import USER, Render, end_of_turn_spelling, ends_of_turn, header_of, openers
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

_HOW = "put {% generation %} ... {% endgeneration %} around the assistant's part of the template"
_THOUGHT = re.compile(r"<think(?:ing)?>.*", re.DOTALL)
_NO_WORDS = ("role", "type", "id", "tool_call_id")  # keys whose values templates compare, and that nobody says


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
    finder = _Spans(hidden, text, owners, render, add_generation_prompt, tokenizer, template)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            try:
                spans += [(i, *span) for span in finder.spans(i)]
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
        prompt: bool,  # whether the text ends on a generation prompt
        tokenizer: Tokenizer,
        template: ChatTemplate,
    ):
        self.hidden, self.text, self.owners, self.render, self.prompt = hidden, text, owners, render, prompt
        self.ends, self.more = ends_of_turn(tokenizer, template)
        self.specials = tuple(tokenizer.special_tokens)
        self.openers = openers(tokenizer, template)

    def spans(self, i: int) -> list[tuple[int, int]]:
        """Where message i is learned, in the text's order: its turn, and words of it that stand elsewhere.

        Some templates write what is said beside a tool call only after the tool's answer. Raises ValueError where a turn
        with words would be learned nowhere.
        """
        start, stop = self._turn(i)
        found = [(start, stop)]
        said = self._said(i)
        if start == stop and (said or self.hidden[i].get("tool_calls")):
            raise ValueError(
                f"the chat template writes message {i} differently once others follow, so its words can't be told; {_HOW}"
            )
        run: list[int] = []
        for at, owner in self.owners or ():
            if owner == i and at in said and not start < at <= stop:
                run.append(at)
            elif run and owner != i:
                found.append((run[0] - 1, self._word_end(i, run[-1], at - 1)))
                run = []
        if run:
            found.append((run[0] - 1, self._word_end(i, run[-1], len(self.text))))
        return sorted(found)

    def _said(self, i: int) -> set[int]:
        """Places of the words that message i says: a call's name stands in the tool's answer too, where it isn't said."""
        if self.owners is None:
            return set()
        message = self.hidden[i]
        if not message.get("tool_calls"):
            return {at for at, owner in self.owners if owner == i}
        silent = (*_NO_WORDS, "tool_calls")
        mine = {
            key: map_strings(value, lambda s: own(s, i, tags=True))
            for key, value in message.items()
            if key not in silent
        }
        try:
            plain, owners = read_owners(
                self.render([*self.hidden[:i], {**message, **mine}, *self.hidden[i + 1 :]], self.prompt)
            )
        except ValueError:
            return set()
        return {at for at, _ in owners} if plain == self.text else set()

    def _turn(self, i: int) -> tuple[int, int]:
        """[start, stop) of the turn itself."""
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
            header = header_of(self.render, self.hidden[:i], [USER])
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

    def _stop(self, i: int, last: int, high: int) -> int:
        bound = high if self.owners is not None else self._turn_end(i, high, exact=True)
        if self.ends:
            for match in template_specials(self.text, self.specials, last):
                if match.start() >= bound:
                    break
                if match.group() in self.ends and match.end() <= bound:
                    more = self.more if self.text.startswith(self.more, match.end()) else ""
                    return min(match.end() + len(more), bound)
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
        said = max((at for at in self._said(i) if at <= high), default=0)
        if same < said:  # an earlier part of the turn is written differently now, such as a thought that is left out
            return self._word_end(i, said, high)
        if same <= high:
            return same
        # Another's words come sooner, with whatever the template writes to open them: end with the own last word.
        own_places = [at for at, owner in self.owners or () if owner == i and at <= high]
        if not own_places:
            return self._start(i, *self._neighbours(i)[:2])
        return self._word_end(i, own_places[-1], high)

    def _word_end(self, i: int, last: int, high: int) -> int:
        """The end of the word of message i whose last mark is at `last`; nothing from `high` on."""
        if not re.search(r"[<>\[\]]\S*\s*$", str(self.hidden[i].get("content", ""))):
            return last
        edge = min((m.start() for m in template_specials(self.text, self.specials, last)), default=high)
        space = re.compile(r"\s").search(self.text, last, high)  # such a last word carries no mark at its end
        return min(edge, space.start() if space else high, high)


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
