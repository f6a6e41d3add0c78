"""A loaded base with its adapters, spoken to the way each was trained: behind `graft generate` and `graft chat`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from ..base.generate.sampling import Sampling
from ..base.generate.speculative import Drafter
from ..base.hub import model_folder
from ..base.json_fields import read_json
from ..base.model.transformer import Transformer
from ..base.text.printable import printable
from ..base.tokenizer.tokenizer import Tokenizer
from .adapters.bank import AdapterBank
from .adapters.combine import read_stack, stacked_adapter
from .adapters.files import GRAFT, Adapter, template_args_of
from .data.chat import ChatTemplate, encode_prompt
from .data.records import Message
from .data.shape import in_shape
from .data.templates import template_source
from .generate import Answer, generate_answers, generate_beams, start_ids
from .loading import check_finite, check_token_ids, load_model
from .speculate import make_drafter

SHOWN = 40  # characters of a forgotten message
HELP = "/adapter NAME swaps (A:0.7,B:0.3 adds up), /adapters lists, /base turns them off, /new forgets the talk, /quit ends"


class Session:
    """One base in memory. A prompt goes through the chat template if the adapter in use (or the base) learned that way.

    Raises ValueError for a base with NaN in its weights or a token beyond its embedding's rows.
    """

    def __init__(
        self,
        base: Path | str,
        *,
        dtype: str,
        device: str,
        chat: bool | None,  # whether prompts are turns of a conversation; None: as trained
        chat_template: str | None = None,  # a name or a file; None: the adapter's, else the base's
        template_args: Mapping[str, Any] | None = None,  # None: those of training
    ) -> None:
        base = model_folder(base)
        self.model: Transformer = load_model(base, dtype=dtype, device=device)
        self.tokenizer = Tokenizer.load(base)
        check_token_ids(self.tokenizer, self.model.config, where=base)
        check_finite(self.model, where=base)
        self.bank = AdapterBank(self.model)
        self._drafter: Drafter | None = None
        self.chat = chat
        self._source = template_source(chat_template) if chat_template else None
        self._args = template_args
        metadata = read_json(base / GRAFT) if (base / GRAFT).exists() else {}
        self._base_args = template_args_of(metadata, base)
        self.base_is_chat = metadata.get("prompt_format") == "chat" or (
            not metadata and self.tokenizer.chat_template is not None
        )

    def load(self, name: str, folder: Path | str) -> None:
        """Load an adapter, or a stack such as a:0.7,b:0.3 of folders, and use it."""
        self.bank.add(name, read_stack(folder))
        self.use(name)

    def use(self, name: str | None) -> None:
        """Swap; None is the bare base. A stack of loaded adapters, such as spam:0.7,style:0.3, is made when it is first used."""
        if name is not None and name not in self.bank.adapters and ":" in name:
            self.bank.add(name, stacked_adapter(name, self._loaded))
        self.bank.use(name)

    def _loaded(self, name: str) -> Adapter:
        if name not in self.bank.adapters:
            raise ValueError(f"no adapter {name!r} is loaded; loaded are: {', '.join(self.bank.names) or 'none'}")
        return self.bank.adapters[name]

    @property
    def is_chat(self) -> bool:
        """Whether prompts are wrapped as turns now."""
        return self._learned_turns(self.bank.active) if self.chat is None else self.chat

    def _learned_turns(self, name: str | None) -> bool:
        if name is None:
            return self.base_is_chat
        return self.bank.adapters[name].graft.get("prompt_format", "chat") == "chat"

    @property
    def shape(self) -> dict[str, str] | None:
        """What the active adapter's prompts have before and after their own part; None where that isn't known."""
        active = self.bank.active
        return self.bank.adapters[active].prompt_shape if active is not None and not self.is_chat else None

    def describe(self, name: str | None) -> str:
        """What an adapter's prompts look like, in a few words."""
        if self._learned_turns(name) if self.chat is None else self.chat:
            return "takes turns of a conversation"
        shape = self.bank.adapters[name].prompt_shape if name is not None else None
        if shape is None:
            return "goes on from plain text"
        return f"takes prompts {shape['before'] + '...' + shape['after']!r}; type the ... alone"

    def template(self) -> ChatTemplate:
        """The template asked for, else the adapter's own, else the tokenizer's; with its arguments."""
        adapter = self.bank.adapters[self.bank.active] if self.bank.active else None
        source = self._source or (adapter.chat_template if adapter else None)
        args = self._args
        if args is None:
            args = adapter.template_args if adapter else self._base_args
        return ChatTemplate.of(self.tokenizer, source, args=args)

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """What generation starts from: the rendered conversation, or the last message's plain text."""
        if self.is_chat:
            return encode_prompt(messages, self.tokenizer, self.template()).tolist()
        return start_ids(encode_prompt(str(messages[-1]["content"]), self.tokenizer).tolist(), self.tokenizer)

    def fitting(self, messages: Sequence[Message], room: int) -> list[Message]:
        """The conversation without its oldest turns, so that prompt and `room` tokens fit the model.

        A system message stays, and so does the last one, also where it doesn't fit alone.
        """
        kept, n_system = list(messages), int(bool(messages) and messages[0]["role"] == "system")
        while len(kept) > n_system + 1 and len(self.prompt_ids(kept)) + room > self.model.config.max_seq_len:
            del kept[n_system]
            while len(kept) > n_system + 1 and kept[n_system]["role"] != "user":
                del kept[n_system]
        return kept

    def answer(
        self,
        messages: Sequence[Message],
        *,
        sampling: Sampling,
        stop: Sequence[str] = (),
        on_text: Callable[[str], None] | None = None,
    ) -> str:
        """The reply to a conversation, handed out piece by piece as it comes; shorter than asked for where the model ends."""
        [answer] = self.answers([messages], sampling=sampling, stop=stop, on_text=on_text and (lambda _, p: on_text(p)))
        return answer.text

    def answers(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        sampling: Sampling,
        stop: Sequence[str] = (),
        n_beams: int = 1,  # above 1: beam search, without streaming
        length_penalty: float = 1.0,
        on_text: Callable[[int, str], None] | None = None,
    ) -> list[Answer]:
        """The reply to each of several conversations. Raises ValueError that names every one that leaves no room."""
        prompts = [self.prompt_ids(messages) for messages in conversations]
        limit = self.model.config.max_seq_len
        too_long = [(i, len(ids)) for i, ids in enumerate(prompts, 1) if len(ids) >= limit]
        if too_long:
            which = "the conversation" if len(prompts) == 1 else f"prompt {', '.join(str(i) for i, _ in too_long[:5])}"
            more = f" (and {len(too_long) - 5} more)" if len(too_long) > 5 else ""
            raise ValueError(
                f"{which}{more} has {too_long[0][1]} tokens, the model reads {limit}; shorten the prompt, or begin anew with /new"
            )
        room = min(limit - len(ids) for ids in prompts)
        sampling = replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room))
        if n_beams != 1:
            return generate_beams(
                self.model, self.tokenizer, prompts, sampling, n_beams=n_beams, length_penalty=length_penalty,
                template=self.template(), stop=stop,
            )  # fmt: skip
        return generate_answers(
            self.model,
            self.tokenizer,
            prompts,
            sampling,
            template=self.template(),
            stop=stop,
            on_text=on_text,
            drafter=self._drafter,
        )

    def speculate(self, name: str, *, dtype: str = "float32", device: str = "auto") -> None:
        """Guess tokens ahead in all answers from now on: `ngram`, or the folder of a small model (speculate.py)."""
        self._drafter = make_drafter(name, self.model, self.tokenizer, dtype=dtype, device=device)

    @torch.inference_mode()
    def log_probabilities(self, messages: Sequence[Message], new: Sequence[int]) -> list[float]:
        """log p of each new token after the prompt and the tokens before it, in nats: the model's own, without temperature."""
        if not new:
            return []
        prompt = self.prompt_ids(messages)
        ids = torch.tensor([[*prompt, *new]], device=self.model.model.embed_tokens.weight.device)
        logits = self.model(ids)[0, len(prompt) - 1 : -1]  # (len(new), V)
        chosen = logits.float().log_softmax(-1).gather(-1, ids[0, len(prompt) :, None])
        return chosen[:, 0].tolist()


def named_folders(assignments: Sequence[str]) -> dict[str, Path]:
    """['spam=runs/spam'] -> {'spam': Path}. Raises ValueError for what isn't NAME=DIR, and for a name given twice."""
    found = {}
    for assignment in assignments:
        name, equals, folder = assignment.partition("=")
        if not (equals and name and folder):
            raise ValueError(f"adapter {assignment!r} is not NAME=DIR; write for example spam=runs/demo/adapters/spam")
        if name in found:
            raise ValueError(f"adapter {name!r} is given twice; choose another name for one of them")
        found[name] = Path(folder)
    return found


def talk(session: Session, sampling: Sampling) -> None:
    """Read turns from standard input until /quit or its end; commands begin with a slash.

    Where an adapter learned a task's prompts, a line is put into that shape. Turns that no longer fit the model are left
    out, the oldest first, and that is said.
    """
    console = Console()
    _say(console, HELP, "dim")
    for name in session.bank.names:
        _say(console, f"{name} {session.describe(name)}", "dim")
    messages: list[Message] = []
    while True:
        try:
            line = console.input(Text(f"{printable(session.bank.active or 'base')}> ", "bold")).strip()
        except EOFError:
            return
        if line.startswith("/"):
            if not _command(session, line, messages, console):
                return
            continue
        if not line:
            continue
        messages.append({"role": "user", "content": in_shape(line, session.shape) if session.shape else line})
        try:
            if session.is_chat:
                _forget_oldest(session, messages, sampling, console)
            reply = session.answer(messages, sampling=sampling, on_text=lambda piece: _write(console, piece))
        except ValueError as error:
            messages.pop()
            _say(console, str(error), "red")
            continue
        console.print()
        messages.append({"role": "assistant", "content": reply})


def _forget_oldest(session: Session, messages: list[Message], sampling: Sampling, console: Console) -> None:
    """Drop what doesn't fit beside an answer of at most a quarter of the model's length, and say how much and what."""
    room = min(sampling.max_new_tokens, session.model.config.max_seq_len // 4)
    kept = session.fitting(messages, room)
    if n_dropped := len(messages) - len(kept):
        ids = {id(message) for message in kept}
        dropped = next(str(message["content"]) for message in messages if id(message) not in ids)
        first = dropped[:SHOWN] + ("..." if len(dropped) > SHOWN else "")
        _say(
            console,
            f"the talk is too long for the model: its {n_dropped} oldest messages are forgotten, from {first!r} on",
            "dim",
        )
        messages[:] = kept


def _command(session: Session, line: str, messages: list[Message], console: Console) -> bool:
    """Carry out a slash command; False ends the talk. A swap begins a new conversation: another model said the old one."""
    word, _, argument = line.partition(" ")
    try:
        if word == "/quit":
            return False
        if word == "/adapter":
            session.use(argument.strip())
            messages.clear()
            _say(console, session.describe(argument.strip()), "dim")
        elif word == "/base":
            session.use(None)
            messages.clear()
        elif word == "/adapters":
            for name in session.bank.names:
                adapter = session.bank.adapters[name]
                what = session.describe(name)
                _say(console, f"{name}  ranks {adapter.ranks}  {adapter.n_bytes:,} bytes  {adapter.where}  {what}")
            if not session.bank.names:
                _say(console, "none loaded; start graft chat with --adapter NAME=DIR")
        elif word == "/new":
            messages.clear()
        else:
            _say(console, HELP)
    except ValueError as error:
        _say(console, str(error), "red")
    return True


def _say(console: Console, text: str, style: str = "") -> None:
    """Print text that may come from outside: no markup, no control characters."""
    console.print(Text(printable(text, keep="\n\t"), style), highlight=False, soft_wrap=True)


def _write(console: Console, piece: str) -> None:
    console.print(printable(piece, keep="\n\t"), end="", markup=False, highlight=False, soft_wrap=True)
