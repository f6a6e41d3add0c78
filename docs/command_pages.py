"""A page for each command, from the typer app: its text, its example, its options, and the keys that --set reaches."""

import json
from collections.abc import Iterator
from typing import Any

import typer.main
from rich.text import Text
from typer.testing import CliRunner

from graft.cli import ORDER, app

ROOT = typer.main.get_command(app)


def leaves(command: Any = ROOT, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command that can be run, as (("adapter", "merge"), command), in the order of --help."""
    children = getattr(command, "commands", None)
    if children is None:
        yield path, command
        return
    for name in command.list_commands(context_of(command)):
        yield from leaves(children[name], (*path, name))


def context_of(command: Any, name: str = "graft") -> Any:
    """What Click asks for to describe a command. (Typer has a Click of its own since 0.29, hence no import of it.)"""
    return command.context_class(command, info_name=name)


def pages() -> dict[str, str]:
    """commands/NAME.md -> Markdown, and the index."""
    keys = json.loads(CliRunner().invoke(app, ["config", "--json"]).stdout)
    found = {"commands/index.md": _index()}
    for path, command in leaves():
        found[_file(path)] = _page(path, command, keys.get(path[0], {}) if len(path) == 1 else {})
    return found


def navigation(names: dict[str, str]) -> list[dict[str, str]]:
    """The entries of the navigation, in the order of the pages."""
    titles = {_file(path): " ".join(path) for path, _ in leaves()}
    return [{titles.get(name, "All commands"): name} for name in names if name.startswith("commands/")]


def _file(path: tuple[str, ...]) -> str:
    return f"commands/{'-'.join(path)}.md"


def _index() -> str:
    lines = ["# Commands", "", "`graft --help` lists the same; each page is generated from the code.", ""]
    by_first: dict[str, list[tuple[tuple[str, ...], Any]]] = {}
    for path, command in leaves():
        by_first.setdefault(path[0], []).append((path, command))
    for panel, names in ORDER.items():
        lines += [f"## {panel.partition('. ')[2]}", "", "| command | what it does |", "| --- | --- |"]
        for path, command in (leaf for name in names for leaf in by_first.get(name, [])):
            lines.append(f"| [graft {' '.join(path)}]({'-'.join(path)}.md) | {_cell(_paragraphs(command)[0])} |")
        lines.append("")
    lines += ["## Exit codes", "", "| code | meaning |", "| --- | --- |", *EXIT_CODES, ""]
    return "\n".join(lines)


EXIT_CODES = (
    "| 0 | done |",
    "| 1 | bad input, a file or a device that fails, memory that does not suffice: one line says which |",
    "| 2 | wrong usage: an unknown command or option |",
    "| 70 | a bug of graft's: the line names a file with the traceback |",
    "| 130 | Ctrl-C; a training run saves a checkpoint first |",
)


def _paragraphs(command: Any) -> list[str]:
    """The command's help, a paragraph each, without `Example:`."""
    text = Text.from_markup(command.help or "").plain
    return [" ".join(part.split()) for part in text.split("\n\n") if not part.strip().startswith("Example:")]


def example_of(command: Any) -> str | None:
    """The line behind `Example:` in the command's help."""
    _, found, line = Text.from_markup(command.help or "").plain.partition("Example:")
    return " ".join(line.split()) if found else None


def _page(path: tuple[str, ...], command: Any, keys: dict[str, list[dict[str, str]]]) -> str:
    name = f"graft {' '.join(path)}"
    usage = " ".join(command.collect_usage_pieces(context_of(command, name)))
    lines = [f"# {name}", "", *(line for part in _paragraphs(command) for line in (part, ""))]
    lines += ["```console", f"{name} {usage}", "```", ""]
    if example := example_of(command):
        lines += ["Example:", "", "```bash", example, "```", ""]
    for kind, title in (("argument", "Arguments"), ("option", "Options")):
        chosen = [p for p in command.params if p.param_type_name == kind and not getattr(p, "hidden", False)]
        if chosen:
            lines += [f"## {title}", "", f"| {kind} | type | default | meaning |", "| --- | --- | --- | --- |"]
            lines += [_row(parameter, context_of(command)) for parameter in chosen]
            lines.append("")
    if keys:
        lines += [
            "## Keys",
            "",
            "Each is given by `--set key=value`, in a TOML file (the argument `config`; the tables only group keys), or as a "
            f"keyword argument in Python. `graft config {path[0]}` prints the same.",
            "",
        ]
        for part, described in keys.items():
            lines += [f"### {part}", "", "| key | type | default | meaning |", "| --- | --- | --- | --- |"]
            lines += [
                f"| `{key['name']}` | {_cell(key['type'])} | {_cell(key['default'])} | {_cell(key['meaning'])} |"
                for key in described
            ]
            lines.append("")
    return "\n".join(lines)


def _row(parameter: Any, context: Any) -> str:
    help_text = Text.from_markup(getattr(parameter, "help", None) or "").plain
    meaning, _, said = help_text.partition("[default: ")
    default = parameter.get_default(context, call=False)
    shown = said.rstrip("] ") or ("required" if parameter.required else _shown_default(default))
    names = (
        parameter.name
        if parameter.param_type_name == "argument"
        else ", ".join([*parameter.opts, *parameter.secondary_opts])
    )
    kind = "flag" if getattr(parameter, "is_flag", False) else _type(parameter, context)
    is_repeated = getattr(parameter, "multiple", False) or parameter.nargs == -1
    repeated = ", can be repeated" if is_repeated and "be repeated" not in meaning else ""
    return f"| `{names}` | {_cell(kind + repeated)} | {_cell(shown)} | {_cell(meaning.strip())} |"


def _type(parameter: Any, context: Any) -> str:
    """The type as --help names it: int, float, text, path."""
    name = parameter.display_type(context).strip("<>") if hasattr(parameter, "display_type") else parameter.type.name
    name = name.removeprefix("list[").removesuffix("]").lower()
    return {"str": "text", "file": "path", "integer": "int"}.get(name, name)


def _shown_default(default: object) -> str:
    return "" if default in (None, False, "", ()) or callable(default) else str(default)


def _cell(text: str) -> str:
    """One line in which Markdown and HTML see no marks of their own."""
    for mark in ("\\", "|", "<", "*", "_", "[", "`"):
        text = text.replace(mark, "&lt;" if mark == "<" else f"\\{mark}")
    return " ".join(text.split())
