"""What the pages tell a reader to type: every command line, option, key and name is one that graft has, and it runs."""

import contextlib
import io
import json
import re
import shlex
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer.main

import graft
from graft.base.settings import check_settings
from graft.cli import app, main

ROOT = typer.main.get_command(app)
STAGES = ("sft", "pretrain", "dpo", "reward", "grpo", "ppo")


def lines_of(block: Any) -> list[str]:
    """The graft commands of a bash block."""
    joined = block.text.replace("\\\n", " ").splitlines()
    return [line for line in joined if line.startswith("graft ")] if block.kind == "bash" else []


def words_of(line: str) -> list[str]:
    """A shell line as words; $'...' is Bash's, whose escapes don't matter here."""
    return shlex.split(line.replace("$'", "'"), comments=True)[1:]


def parse(words: list[str]) -> Any:
    """Click's own parsing, with types and required options, without running anything."""
    command: Any = ROOT
    while hasattr(command, "commands") and words and not words[0].startswith("-"):
        assert words[0] in command.commands, f"no command {words[0]!r}"
        command, words = command.commands[words[0]], words[1:]
    if words in (["--version"], ["--help"]):
        return command
    command.make_context("graft", list(words))
    return command


def parts_of(command: str) -> list[type]:
    """The parts of a training command's config."""
    if command == "pretrain":
        from graft.base.pretrain import PARTS
    elif command == "sft":
        from graft.finetune.sft import PARTS
    else:
        from graft.finetune.align.commands import parts_of as align_parts

        return list(align_parts(command).values())
    return list(PARTS.values())


def test_each_command_line_parses(blocks: list[Any]) -> None:
    """Law: every `graft ...` line of the pages parses as it stands, and its --set keys are keys of that command."""
    seen = [(block.page, line) for block in blocks for line in lines_of(block)]
    assert len(seen) > 40
    for page, line in seen:
        words = words_of(line)
        try:
            parse(words)
            if words[0] == "launch":  # the command that it starts stands behind its own options
                words = words[next(i for i, word in enumerate(words) if word in STAGES) :]
                parse(words)
            given = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
            if given:
                check_settings(dict(one.partition("=")[::2] for one in given), *parts_of(words[0]))
        except Exception as error:
            pytest.fail(f"{page}: {line}\n{error}")


def test_each_example_in_help_parses(generator: Callable[[str], ModuleType]) -> None:
    """Law: every command's help has an example that parses, of the command itself."""
    commands = generator("command_pages")
    leaves = list(commands.leaves())
    assert len(leaves) > 20
    for path, command in leaves:
        example = commands.example_of(command)
        assert example, f"graft {' '.join(path)} has no Example:"
        assert example.startswith(f"graft {' '.join(path)}"), example
        parse(words_of(example))


def test_each_option_in_prose_exists(pages: dict[str, str], generator: Callable[[str], ModuleType]) -> None:
    """Law: every `--option` and `graft command` in the text's code spans is graft's."""
    leaves = list(generator("command_pages").leaves())
    options = {name for _, command in leaves for p in command.params for name in (*p.opts, *p.secondary_opts)}
    options |= {"--version", "--help", "--install-completion", "--show-completion"}
    groups = {" ".join(path[:n]) for path, _ in leaves for n in range(1, len(path) + 1)}
    n_seen = 0
    for page, text in pages.items():
        prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.M)
        for span in re.findall(r"`([^`\n]+)`", prose):
            if span.startswith(("python ", "pip ", "make ")):
                continue
            n_seen += 1
            for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", span):
                assert option in options, f"{page}: `{span}`"
            if match := re.match(r"graft ([a-z0-9]+)( [a-z]+)?", span):
                name = match[1] + (match[2] or "")
                assert name in groups or match[1] in groups, f"{page}: `{span}`"
    assert n_seen > 100


def test_each_toml_block_has_known_keys(blocks: list[Any]) -> None:
    """Law: the pages' TOML files are TOML, and all keys of each are keys of one training command."""
    found = [block for block in blocks if block.kind == "toml"]
    assert len(found) >= 3
    for block in found:
        raw = tomllib.loads(block.text)
        tables = [raw.get("defaults", {}), *raw["jobs"]] if "jobs" in raw else [raw]
        keys: dict[str, Any] = {}
        for table in tables:
            for key, value in table.items():
                keys |= value if isinstance(value, dict) else {key: value}
        keys = {key: value for key, value in keys.items() if key not in ("data", "eval_data", "out", "method")}
        refusals = []
        for stage in STAGES:
            try:
                check_settings(keys, *parts_of(stage))
            except ValueError as error:
                refusals.append(f"{stage}: {error}")
        assert len(refusals) < len(STAGES), f"{block.page}: {refusals}"


def test_each_make_target_exists(blocks: list[Any]) -> None:
    """Law: each `make TARGET` of the pages is in the Makefile."""
    makefile = (Path(graft.__file__).parent / "Makefile").read_text(encoding="utf-8")
    targets = {name for b in blocks if b.kind == "bash" for name in re.findall(r"^make (\w+)", b.text, re.M)}
    assert {"demo", "test"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.M), target


def test_each_python_block_names_what_exists(blocks: list[Any]) -> None:
    """Law: the pages' Python compiles, and each `graft.name` in it is public."""
    found = [block for block in blocks if block.kind == "python"]
    assert len(found) >= 6
    for block in found:
        compile(block.text, block.page, "exec")
        for name in re.findall(r"\bgraft\.(\w+)", block.text):
            assert name in graft.__all__, f"{block.page}: graft.{name}"


# --- running them ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(base_dir: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs/demo as the pages expect it, but tiny, and the pages' TOML files."""
    from graft.finetune.sft import run_sft

    folder = tmp_path_factory.mktemp("docs")
    demo = folder / "runs/demo"
    for task, label in (("spam", " ham"), ("sentiment", " good")):
        (demo / "data" / task).mkdir(parents=True)
        for part, n in (("train", 24), ("eval", 8)):
            rows = [{"prompt": f"the {part} cat {i}:", "completion": label} for i in range(n)]
            (demo / f"data/{task}/{part}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (demo / "base").symlink_to(base_dir)
    (demo / "data/text.txt").symlink_to(text_file)
    (folder / "README.md").write_text("the cat sat on the mat " * 20, encoding="utf-8")
    for name in ("spam", "sentiment"):
        arguments: dict[str, Any] = {"settings": {"steps": 1, "batch_size": 2}, "progress": False, "device": "cpu"}
        data = demo / f"data/{name}/train.jsonl"
        run_sft(base=base_dir, data=data, out=demo / "adapters" / name, method="lora", **arguments)
    return folder


@pytest.mark.slow
def test_each_python_block_runs(
    blocks: list[Any], world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Law: the pages' Python runs as it stands (on a small model) where the demo's results lie, and warns of nothing."""
    monkeypatch.chdir(world)
    for block in blocks:
        if block.kind == "python" and block.in_guide:
            exec(compile(block.text.replace("llama-7b", "nano"), block.page, "exec"), {})
    assert "GiB, at " in capsys.readouterr().out


# What would take long or never end, and what runs in its place.
SHORTER = (
    (r"--steps \d+", "--steps 2"),
    (r"--vocab-size \d+", "--vocab-size 300"),
    (r"--model (llama-7b|mini)", "--model nano"),
    (r"--limit \d+", "--limit 4"),
    (r"--max-new-tokens \d+", "--max-new-tokens 4"),
    (r"--preset nano", "--preset nano --batch-size 2 --set micro_batch=2 --set max_seq_len=64"),
)
# Tests of their own run these: a server, the demo, and predictions by the dozen.
NOT_RUN = ("graft serve", "graft demo", "graft --version", "graft vram measure")


@pytest.mark.slow
def test_each_command_line_runs(blocks: list[Any], world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: the guide's commands, typed one after the other as they stand but for fewer steps, all end well."""
    monkeypatch.chdir(world)
    n_run = 0
    for block in (block for block in blocks if block.in_guide):
        if block.kind == "toml" and (name := re.match(r"# (\S+\.toml)\n", block.text)):
            shorter = re.sub(r"^(steps|epochs) = .*", r"\1 = 1", block.text, flags=re.M)
            (world / name[1]).write_text(shorter, encoding="utf-8")
        for line in lines_of(block):
            if line.startswith(NOT_RUN) or " --fit " in line:
                continue
            for pattern, shorter in SHORTER:
                line = re.sub(pattern, shorter, line)
            out, err, code = run(words_of(line))
            assert code == 0, f"{block.page}: {line}\n{out[-1000:]}\n{err[-1000:]}"
            n_run += 1
    assert n_run > 30


def run(words: list[str]) -> tuple[str, str, int]:
    """graft's main in this process: (standard output, standard error, exit code)."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["graft", *words])
        patch.setattr(sys, "stdin", io.StringIO("hello\n/adapters\n/quit\n"))
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main()
                code: Any = 0
            except SystemExit as stop:
                code = stop.code or 0
    return out.getvalue(), err.getvalue(), int(code)
