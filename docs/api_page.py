"""The page of the Python API: every public name of graft, under the folder it comes from, with the fields of dataclasses."""

import ast
import dataclasses
import inspect
import io
import textwrap
import tokenize
from types import FunctionType

import graft
from graft.base.settings import describe

TITLES = {  # a module's prefix -> the heading over its names; the first that fits is taken
    "base.tokenizer": "Text and tokens",
    "base.model": "Models",
    "finetune.loading": "Models",
    "finetune.quantize": "Models",
    "base.pretrain": "Train",
    "finetune.align": "Align",
    "finetune.adapters": "Adapters",
    "base.generate": "Generate",
    "finetune.generate": "Generate",
    "finetune.evaluation": "Evaluate",
    "finetune.memory": "Memory",
    "finetune": "Train",
    "base": "Train",
}


def title_of(name: str) -> str:
    """The heading that a public name stands under."""
    home = graft._HOME[name].partition(":")[0]
    return next(title for prefix, title in TITLES.items() if home.startswith(prefix))


def page() -> str:
    """Markdown with a `:::` line for each public name, which mkdocstrings fills in from the sources."""
    by_title: dict[str, list[str]] = {title: [] for title in dict.fromkeys(TITLES.values())}
    for name in graft._HOME:
        by_title[title_of(name)].append(name)
    lines = [
        "# Python API",
        "",
        f"graft {graft.__version__}. The public names of `import graft`; each is loaded on first use, so that the import itself is "
        "quick. What starts with an underscore, and modules that aren't named here, may change without a note.",
        "",
        "Errors: a bad value raises `ValueError` (or `TypeError`), a missing file `FileNotFoundError`, and both say what was "
        "wrong, the limit and the next step.",
        "",
    ]
    for title, names in by_title.items():
        if names:
            lines += [f"## {title}", ""]
        for name in names:
            lines += [f"::: graft.{name}", "", *_fields(getattr(graft, name))]
    return "\n".join(lines)


def _fields(value: object) -> list[str]:
    """A table of a dataclass' fields, or of those arguments of a function whose lines carry a comment."""
    if isinstance(value, type) and dataclasses.is_dataclass(value):
        rows = [f"| `{key.name}` | {key.type} | {key.default} | {key.meaning} |" for key in describe(value)]
        return ["| field | type | default | meaning |", "| --- | --- | --- | --- |", *rows, ""]
    if isinstance(value, FunctionType) and (comments := argument_comments(value)):
        return ["| argument | meaning |", "| --- | --- |", *(f"| `{k}` | {v} |" for k, v in comments.items()), ""]
    return []


def argument_comments(function: FunctionType) -> dict[str, str]:
    """Argument -> the comment on its line in the source."""
    source = textwrap.dedent(inspect.getsource(function))
    [body] = ast.parse(source).body
    assert isinstance(body, ast.FunctionDef)
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    arguments = [*body.args.args, *body.args.kwonlyargs, *filter(None, [body.args.kwarg])]
    return {one.arg: comments[one.lineno] for one in arguments if one.lineno in comments}
