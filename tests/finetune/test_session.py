"""A loaded base with adapters: who speaks through a chat template, what a swap forgets, errors that don't end the talk."""

import io
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from graft.base.generate.sampling import Sampling
from graft.base.tokenizer.tokenizer import Tokenizer
from graft.finetune.adapters.files import save_adapter
from graft.finetune.adapters.lora import LoraConfig, attach_lora
from graft.finetune.data.chat import CHATML, ChatTemplate, encode_prompt
from graft.finetune.loading import load_model
from graft.finetune.session import Session, named_folders, talk

MESSAGES = [{"role": "user", "content": "the cat"}]
OTHER = "{% for m in messages %}{{ m['content'] }}!{% endfor %}"


@pytest.fixture(scope="module")
def adapters(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One that learned plain text, one that learned conversations with a template of its own, one without graft.json."""
    folder = tmp_path_factory.mktemp("adapters")
    for name, about, template in (
        ("text", {"prompt_format": "text"}, CHATML),
        ("chat", {"prompt_format": "chat"}, OTHER),
        ("peft", None, None),
    ):
        model = load_model(base_dir)
        config = LoraConfig(rank=2)
        attach_lora(model, config)
        save_adapter(model, folder / name, config, base=str(base_dir), graft=about, chat_template=template)
    return {name: folder / name for name in ("text", "chat", "peft")}


def session(base: Path, adapters: dict[str, Path] | None = None, *, chat: bool | None = None) -> Session:
    made = Session(base, dtype="float32", device="cpu", chat=chat)
    for name, folder in (adapters or {}).items():
        made.load(name, folder)
    return made


def test_each_speaks_as_it_was_trained(base_dir: Path, adapters: dict[str, Path]) -> None:
    """Law: what generation starts from is exactly what stood before the answer in that adapter's training."""
    tokenizer = Tokenizer.load(base_dir)
    plain = tokenizer.encode("the cat").tolist()
    own = tokenizer.encode("the cat!").tolist()
    chatml = encode_prompt(MESSAGES, tokenizer).tolist()
    assert tokenizer.special_tokens["<|im_start|>"] in chatml
    speaker = session(base_dir, adapters)
    assert speaker.bank.active == "peft"
    for name, expected in (("text", plain), ("chat", own), (None, plain), ("peft", chatml), ("text", plain)):
        speaker.use(name)
        assert speaker.prompt_ids(MESSAGES) == expected, name


def test_the_flag_decides_over_the_training(base_dir: Path, adapters: dict[str, Path]) -> None:
    tokenizer = Tokenizer.load(base_dir)
    raw, wrapped = session(base_dir, adapters, chat=False), session(base_dir, adapters, chat=True)
    for name in ("text", "chat", None):
        raw.use(name)
        wrapped.use(name)
        assert raw.prompt_ids(MESSAGES) == tokenizer.encode("the cat").tolist()
        assert wrapped.is_chat
    assert wrapped.prompt_ids(MESSAGES) == encode_prompt(MESSAGES, tokenizer, ChatTemplate.of(tokenizer)).tolist()


def test_a_base_says_how_it_was_trained(base_dir: Path, tmp_path: Path) -> None:
    """Law: graft.json decides; without one a chat template of the tokenizer does; a bare base is plain."""
    assert not session(base_dir).is_chat
    base = tmp_path / "base"
    shutil.copytree(base_dir, base)
    tokenizer = Tokenizer.load(base)
    tokenizer.chat_template = CHATML
    tokenizer.save(base)
    assert session(base).is_chat
    (base / "graft.json").write_text(json.dumps({"prompt_format": "text"}))
    assert not session(base).is_chat
    (base / "graft.json").write_text(json.dumps({"prompt_format": "chat"}))
    assert session(base).is_chat


def test_answers_come_in_pieces_and_fit_the_model(base_dir: Path) -> None:
    """Law: the pieces are the answer; the room is what the prompt leaves of the model's length; none is an error."""
    speaker = session(base_dir)
    pieces: list[str] = []
    text = speaker.answer(MESSAGES, sampling=Sampling(max_new_tokens=9), on_text=pieces.append)
    assert text == "".join(pieces)
    assert speaker.answer(MESSAGES, sampling=Sampling(max_new_tokens=9)) == text
    assert speaker.answer(MESSAGES, sampling=Sampling(max_new_tokens=10_000))  # cut to the room
    assert speaker.answer([{"role": "user", "content": ""}], sampling=Sampling(max_new_tokens=2)) is not None
    with pytest.raises(ValueError, match=r"the conversation has \d+ tokens, the model reads 96; shorten the prompt"):
        speaker.answer([{"role": "user", "content": "the cat " * 90}], sampling=Sampling(max_new_tokens=1))


def test_named_folders() -> None:
    assert named_folders(["a=x/y", "b=c=d"]) == {"a": Path("x/y"), "b": Path("c=d")}
    for wrong in ("x", "=x", "a="):
        with pytest.raises(ValueError, match=f"adapter '{wrong}' is not NAME=DIR"):
            named_folders([wrong])


def test_the_talk(
    base_dir: Path, adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Law: turns add up until a swap or /new, which begin anew; a turn that failed is taken back and the talk goes on."""
    heard: list[tuple[str | None, list[str]]] = []

    def answer(self: Session, messages: Sequence[Any], *, on_text: Any, **options: Any) -> str:
        heard.append((self.bank.active, [m["content"] for m in messages]))
        if messages[-1]["content"] == "too long":
            raise ValueError("the conversation has 99 tokens")
        on_text("[bold]so[/bold] ")  # markup that a model writes is text
        return f"re {messages[-1]['content']}"

    monkeypatch.setattr(Session, "answer", answer)
    lines = ["one", "too long", "", "two", "/adapter chat", "three", "/adapter nobody", "four", "/base", "five", "/new"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join([*lines, "six", "/quit", "seven"])))
    speaker = session(base_dir, adapters)
    speaker.use(None)
    talk(speaker, Sampling(max_new_tokens=1))
    assert heard == [
        (None, ["one"]),
        (None, ["one", "re one", "too long"]),
        (None, ["one", "re one", "two"]),
        ("chat", ["three"]),
        ("chat", ["three", "re three", "four"]),
        (None, ["five"]),
        (None, ["six"]),
    ]
    said = capsys.readouterr().out
    assert "the conversation has 99 tokens" in said
    assert "no adapter 'nobody' is loaded; loaded are: text, chat, peft" in said
    assert said.count("[bold]so[/bold]") == 6
