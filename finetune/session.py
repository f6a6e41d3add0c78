"""A loaded base with its adapters, spoken to the way each was trained: behind `graft generate` and `graft chat`."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from ..base.generate.sampling import Sampling
from ..base.json_fields import read_json
from ..base.model.transformer import Transformer
from ..base.text.printable import markup, printable
from ..base.tokenizer.tokenizer import Tokenizer
from .adapters.bank import AdapterBank
from .adapters.files import GRAFT
from .data.chat import ChatTemplate, encode_prompt
from .data.records import Message
from .generate import generate_rows, start_ids
from .loading import load_model

HELP = "/adapter NAME swaps, /adapters lists, /base turns them off, /new forgets the talk, /quit ends"


class Session:
    """One base in memory. A prompt goes through the chat template if the adapter in use (or the base) learned that way."""

    def __init__(self, base: Path | str, *, dtype: str, device: str, chat: bool | None) -> None:
        self.model: Transformer = load_model(base, dtype=dtype, device=device)
        self.tokenizer = Tokenizer.load(base)
        self.bank = AdapterBank(self.model)
        self.chat = chat  # None: as trained
        about = read_json(Path(base) / GRAFT) if (Path(base) / GRAFT).exists() else {}
        self.base_is_chat = about.get("prompt_format") == "chat" or (
            not about and self.tokenizer.chat_template is not None
        )

    def load(self, name: str, folder: Path | str) -> None:
        """Load an adapter and use it."""
        self.bank.load(name, folder)
        self.use(name)

    def use(self, name: str | None) -> None:
        """Swap; None is the bare base."""
        self.bank.use(name)

    @property
    def is_chat(self) -> bool:
        """Whether prompts are wrapped as turns now."""
        if self.chat is not None:
            return self.chat
        active = self.bank.active
        if active is None:
            return self.base_is_chat
        return self.bank.adapters[active].graft.get("prompt_format", "chat") == "chat"

    def template(self) -> ChatTemplate:
        """The adapter's own chat template, else the tokenizer's."""
        active = self.bank.active
        source = self.bank.adapters[active].chat_template if active else None
        return ChatTemplate.of(self.tokenizer, source)

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """What generation starts from: the rendered conversation, or the last message's plain text."""
        if self.is_chat:
            return encode_prompt(messages, self.tokenizer, self.template()).tolist()
        return start_ids(encode_prompt(str(messages[-1]["content"]), self.tokenizer).tolist(), self.tokenizer)

    def answer(
        self,
        messages: Sequence[Message],
        *,
        sampling: Sampling,
        on_text: Callable[[str], None] | None = None,
    ) -> str:
        """The reply to a conversation, handed out piece by piece as it comes; shorter than asked for where the model ends."""
        ids = self.prompt_ids(messages)
        room = self.model.config.max_seq_len - len(ids)
        if room < 1:
            raise ValueError(
                f"the conversation has {len(ids)} tokens, the model reads {self.model.config.max_seq_len}; "
                "shorten the prompt, or begin anew with /new"
            )
        [text] = generate_rows(
            self.model,
            self.tokenizer,
            [ids],
            replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room)),
            template=self.template(),
            on_text=(lambda row, piece: on_text(piece)) if on_text else None,
        )
        return text


def named_folders(assignments: Sequence[str]) -> dict[str, Path]:
    """['spam=runs/spam'] -> {'spam': Path}. Raises ValueError for what isn't NAME=DIR."""
    found = {}
    for assignment in assignments:
        name, equals, folder = assignment.partition("=")
        if not (equals and name and folder):
            raise ValueError(f"adapter {assignment!r} is not NAME=DIR; write for example spam=runs/demo/adapters/spam")
        found[name] = Path(folder)
    return found


def talk(session: Session, sampling: Sampling) -> None:
    """Read turns from standard input until /quit or its end; commands begin with a slash."""
    console = Console()
    console.print(f"[dim]{HELP}[/dim]", highlight=False)
    messages: list[Message] = []
    while True:
        try:
            line = console.input(f"[bold]{markup(session.bank.active or 'base')}>[/bold] ").strip()
        except EOFError:
            return
        if line.startswith("/"):
            if not _command(session, line, messages, console):
                return
            continue
        if not line:
            continue
        messages.append({"role": "user", "content": line})
        try:
            reply = session.answer(
                messages,
                sampling=sampling,
                on_text=lambda piece: console.print(
                    printable(piece, keep="\n\t"), end="", markup=False, highlight=False, soft_wrap=True
                ),
            )
        except ValueError as error:
            messages.pop()
            console.print(f"[red]{markup(error)}[/red]", highlight=False)
            continue
        console.print()
        messages.append({"role": "assistant", "content": reply})


def _command(session: Session, line: str, messages: list[Message], console: Console) -> bool:
    """Carry out a slash command; False ends the talk. A swap begins a new conversation: another model said the old one."""
    word, _, argument = line.partition(" ")
    try:
        if word == "/quit":
            return False
        if word == "/adapter":
            session.use(argument.strip())
            messages.clear()
        elif word == "/base":
            session.use(None)
            messages.clear()
        elif word == "/adapters":
            for name in session.bank.names:
                adapter = session.bank.adapters[name]
                console.print(
                    f"{markup(name)}  ranks {adapter.ranks}  {adapter.n_bytes:,} bytes  {markup(adapter.where)}",
                    highlight=False,
                )
            if not session.bank.names:
                console.print("none loaded; start graft chat with --adapter NAME=DIR")
        elif word == "/new":
            messages.clear()
        else:
            console.print(HELP, highlight=False)
    except ValueError as error:
        console.print(f"[red]{markup(error)}[/red]", highlight=False)
    return True
