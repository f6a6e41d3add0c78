"""A loaded base with adapters: who speaks through a chat template, what a swap forgets, errors that don't end the talk."""

import io
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from graft.base.generate.sampling import Sampling
from graft.base.tokenizer.tokenizer import Tokenizer
from graft.finetune.adapters.files import save_adapter
from graft.finetune.adapters.lora import LoraConfig, attach_lora
from graft.finetune.adapters.merge import run_merge
from graft.finetune.data.chat import CHATML, ChatTemplate, encode_prompt
from graft.finetune.evaluation.run import run_evaluate
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


def test_a_line_is_put_into_the_tasks_shape(
    base_dir: Path, adapters: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Law: where an adapter learned prompts of one shape, chat says which, and a typed line takes it; graft.json that is
    damaged is one line."""
    shaped = tmp_path / "shaped"
    shutil.copytree(adapters["text"], shaped)
    metadata = {"prompt_format": "text", "prompt_shape": {"before": "Message: ", "after": "\nLabel:"}}
    (shaped / "graft.json").write_text(json.dumps(metadata))
    heard: list[str] = []

    def answer(self: Session, messages: Sequence[Any], **options: Any) -> str:
        heard.append(messages[-1]["content"])
        return "ham"

    monkeypatch.setattr(Session, "answer", answer)
    monkeypatch.setattr(sys, "stdin", io.StringIO("you won\n/base\nyou won\n/adapter text\nyou won"))
    speaker = session(base_dir, {"text": adapters["text"], "shaped": shaped})
    talk(speaker, Sampling(max_new_tokens=1))
    assert heard == ["Message: you won\nLabel:", "you won", "you won"]
    said = capsys.readouterr().out
    assert r"shaped takes prompts 'Message: ...\nLabel:'; type the ... alone" in said.replace("\n", "")
    assert "text goes on from plain text" in said
    (shaped / "graft.json").write_text(json.dumps({"prompt_format": "text", "prompt_shape": 3}))
    with pytest.raises(ValueError, match=r"shaped/graft\.json: prompt_shape is 3; expected an object"):
        session(base_dir, {"shaped": shaped}).describe("shaped")


def test_a_long_talk_forgets_its_oldest_turns(
    base_dir: Path, adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Law: turns are left out from the front, in pairs, until prompt and answer fit, and how many is said; the system's
    message stays."""
    speaker = session(base_dir, {"chat": adapters["chat"]})
    turns = [{"role": role, "content": "the cat sat"} for _ in range(12) for role in ("user", "assistant")]
    turns = [{"role": "system", "content": "a bird"}, *turns, {"role": "user", "content": "rivers"}]
    for room in range(1, 60):
        kept = speaker.fitting(turns, room)
        assert kept[0] == turns[0]
        assert kept[1]["role"] == "user"
        assert kept[1:] == turns[-len(kept) + 1 :]
        assert len(speaker.prompt_ids(kept)) + room <= 96
        one_turn_more = [turns[0], *turns[-len(kept) - 1 :]]  # a question and its answer
        assert len(speaker.prompt_ids(one_turn_more)) + room > 96
    assert speaker.fitting(turns[:3], 10) == turns[:3]
    monkeypatch.setattr(Session, "answer", lambda self, messages, **options: "the tree stood by the river")
    monkeypatch.setattr(sys, "stdin", io.StringIO("the cat sat on the mat\n" * 12))
    talk(speaker, Sampling(max_new_tokens=8))
    said = capsys.readouterr().out
    forgotten = "its 2 oldest messages are forgotten, from 'the cat sat on the mat' on"
    assert f"the talk is too long for the model: {forgotten}" in said.replace("\n", "")


def test_nothing_that_is_printed_steers_the_terminal(
    base_dir: Path, adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Law: ESC, C1 and markup in names, answers and errors come out as text."""
    name = "[/x] \x1b[2J\x9b"

    def answer(self: Session, messages: Sequence[Any], *, on_text: Any, **options: Any) -> str:
        on_text("\x1b]0;title\x07 [red]")
        return "x"

    monkeypatch.setattr(Session, "answer", answer)
    monkeypatch.setattr(sys, "stdin", io.StringIO("hi\n/adapters\n/adapter [/bold] \x1b[1m\n[oops"))
    speaker = session(base_dir, {name: adapters["chat"]})
    talk(speaker, Sampling(max_new_tokens=1))
    said = capsys.readouterr().out
    assert "\x1b" not in said
    assert "\x9b" not in said
    assert r"\x1b]0;title\x07 [red]" in said
    assert r"[/x] \x1b[2J\x9b> " in said
    assert r"no adapter '[/bold] \x1b[1m'" in said.replace(r"\\x1b", r"\x1b")


def test_what_a_base_must_not_hold(base_dir: Path, tmp_path: Path) -> None:
    """Law: a NaN in a weight and a token beyond the embedding's rows are one line when the base is loaded."""
    for change, message in (
        ("nan", r"base: model\.layers\.1\.mlp\.up_proj\.weight holds NaN or infinity"),
        ("id", "has id 400"),
    ):
        base = tmp_path / change / "base"
        shutil.copytree(base_dir, base)
        if change == "nan":
            weights = load_file(base / "model.safetensors")
            weights["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
            save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
        else:
            config = json.loads((base / "config.json").read_text())
            (base / "config.json").write_text(json.dumps(config | {"eos_token_id": 400}))
        with pytest.raises(ValueError, match=message):
            session(base)
        with pytest.raises(ValueError, match=message):
            run_evaluate(base, tmp_path / "none.jsonl", device="cpu")
        with pytest.raises(ValueError, match=message):
            run_merge(base, peft_adapter(base_dir, tmp_path / change), tmp_path / change / "merged")
        assert not (tmp_path / change / "merged").exists()


def peft_adapter(base: Path, folder: Path) -> Path:
    model, config = load_model(base), LoraConfig(rank=2)
    attach_lora(model, config)
    save_adapter(model, folder / "adapter", config, base=str(base))
    return folder / "adapter"
