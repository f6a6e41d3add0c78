"""README's commands run: each `graft ...` line parses against the real command line, the Python block runs on a tiny base."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

import graft
from graft.cli import app

README = (Path(graft.__file__).parent / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    shlex.split(line, comments=True)
    for kind, block in BLOCKS
    if kind == "bash"
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith("graft ")
]


def parameters_of(words: list[str]) -> tuple[set[str], list[str]]:
    """(the options that the named command knows, the words behind its name)."""
    import typer.main

    command = typer.main.get_command(app)
    words = words[1:]
    while hasattr(command, "commands"):
        assert words, "a group without its command"
        assert words[0] in command.commands, f"no command {words[0]!r}"
        command, words = command.commands[words[0]], words[1:]
    known = {option for parameter in command.params for option in parameter.opts + parameter.secondary_opts}
    if command.name == "launch":  # the command that it starts takes the words behind its own options
        inner = next(i for i, word in enumerate(words) if word in typer.main.get_command(app).commands)
        further, behind = parameters_of(["graft", *words[inner:]])
        assert all(word in known for word in words[:inner] if word.startswith("--"))
        return further, behind
    return known, words


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_each_command_line_exists(words: list[str]) -> None:
    """Law: every command and every option that the README shows is one that graft has."""
    known, rest = parameters_of(words)
    unknown = [word for word in rest if word.startswith("--") and word.partition("=")[0] not in known]
    assert not unknown


def test_the_readme_shows_every_stage() -> None:
    """Law: each stage of the pipeline stands in the README with its command."""
    shown = {" ".join(words[1:3]) for words in COMMANDS} | {words[1] for words in COMMANDS}
    for stage in ("tokenizer train", "data prepare", "pretrain", "sft", "generate", "chat", "eval", "adapter merge"):
        assert stage in shown, stage
    assert {"quantize", "plot", "doctor", "vram estimate", "plan"} <= shown


def test_no_placeholder_is_left() -> None:
    """Law: no word in capitals stands where a number belongs."""
    assert not re.search(r"\b[A-Z]{4,} (lines|seconds|tests)\b", README)


def test_make_targets_exist() -> None:
    """Law: each `make TARGET` of the README is in the Makefile."""
    makefile = (Path(graft.__file__).parent / "Makefile").read_text(encoding="utf-8")
    targets = set(
        re.findall(r"^make (\w+)", "\n".join(block for kind, block in BLOCKS if kind == "bash"), re.MULTILINE)
    )
    assert {"demo", "test"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_python_block_runs(base_dir: Path, text_file: Path, tmp_path: Path) -> None:
    """Law: the README's Python runs as it stands, on folders of the names it uses."""
    from graft.finetune.sft import run_sft

    folder = tmp_path / "runs/demo"
    folder.mkdir(parents=True)
    (folder / "base").symlink_to(base_dir)
    (folder / "data").mkdir()
    (folder / "data/text.txt").symlink_to(text_file)
    (tmp_path / "data.jsonl").write_text('{"prompt": "the cat", "completion": " sat"}\n' * 4)
    for name in ("spam", "sentiment"):
        settings = {"steps": 1, "batch_size": 2}
        arguments = {"base": base_dir, "data": tmp_path / "data.jsonl", "settings": settings, "progress": False}
        run_sft(out=folder / "adapters" / name, method="lora", device="cpu", **arguments)
    [code] = [block for kind, block in BLOCKS if kind == "python"]
    done = subprocess.run(
        [__import__("sys").executable, "-W", "error", "-c", code.replace("vocab_size=2048", "vocab_size=300")],
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_pictures_are_there_and_nothing_is_left_to_fill() -> None:
    """Law: each picture that the README shows is a PNG in the repository; no placeholder stands in its text."""
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README)
    assert len(pictures) >= 2
    for name in pictures:
        assert (Path(graft.__file__).parent / name).read_bytes().startswith(b"\x89PNG"), name
    assert not re.findall(r"\b[A-Z]{3,}_[A-Z_]+\b", README.replace("README", ""))
