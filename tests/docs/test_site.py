"""The site as a reader gets it: it builds without a warning, and has a page for each command and a section for each name."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest

import graft

ROOT = Path(graft.__file__).parent
NEEDED = ("mkdocs", "material", "mkdocstrings")


@pytest.mark.slow
@pytest.mark.skipif(any(find_spec(name) is None for name in NEEDED), reason="the extra docs is not installed")
def test_the_site_builds(tmp_path: Path, generator: Callable[[str], ModuleType]) -> None:
    """Law: mkdocs --strict finds no broken link or anchor and no page outside the navigation; nothing but pages and pictures
    is copied; each command has a page, each public name its section."""
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    site = tmp_path / "site"
    for path, _ in generator("command_pages").leaves():
        assert (site / "commands" / f"{'-'.join(path)}.html").is_file(), path
    api = (site / "api.html").read_text(encoding="utf-8")
    for name in graft.__all__:
        if name != "__version__":
            assert f'id="graft.{name}"' in api, name
    assert not [path for path in site.rglob("*") if path.suffix in (".py", ".pyc", ".csv", ".ipynb", ".md")]


def test_a_command_page_has_every_option(generator: Callable[[str], ModuleType]) -> None:
    """Law: each option and argument of each command stands on its page, and each config key of a training command."""
    commands = generator("command_pages")
    pages = commands.pages()
    for path, command in commands.leaves():
        page = pages[f"commands/{'-'.join(path)}.md"]
        assert page.startswith(f"# graft {' '.join(path)}\n")
        for parameter in command.params:
            names = [parameter.name] if parameter.param_type_name == "argument" else parameter.opts
            assert f"| `{names[0]}" in page, (path, names)
        assert f"]({'-'.join(path)}.md)" in pages["commands/index.md"]
    assert "| `--device` | text | auto |" in pages["commands/sft.md"]
    assert "| `--base` | path | required |" in pages["commands/quantize.md"]
    assert "| `--rank` | int | 16 | Rank of the adapter. |" in pages["commands/sft.md"]
    assert "| `packing` | bool | false |" in pages["commands/sft.md"]
    assert "| `group_size` |" in pages["commands/grpo.md"]
    titles = [next(iter(entry)) for entry in commands.navigation(pages)]
    assert titles[0] == "All commands"
    assert {"sft", "adapter merge"} <= set(titles)


def test_cells_stay_in_their_table(generator: Callable[[str], ModuleType]) -> None:
    """Worked by hand: a bar would end the cell, a bracket would begin a link, < would be HTML."""
    assert generator("command_pages")._cell("a|b <c>\n [d] `e` f_g*") == r"a\|b &lt;c> \[d] \`e\` f\_g\*"


def test_a_functions_comments_are_its_arguments(generator: Callable[[str], ModuleType]) -> None:
    """Law: the API's table of arguments is the comments in the source."""
    comments = generator("api_page").argument_comments(graft.generate)
    assert comments["temperature"] == "0: the most probable token"
    assert "prompts" not in comments


def test_every_public_name_has_a_heading(generator: Callable[[str], ModuleType]) -> None:
    """Law: a name that is added to graft.__all__ comes into the API's page by itself."""
    page = generator("api_page").page()
    for name in graft.__all__:
        assert name == "__version__" or f"::: graft.{name}\n" in page


def test_a_recipe_becomes_text_and_a_block(generator: Callable[[str], ModuleType]) -> None:
    """Worked by hand: the comment at the top is text, a command in it a block; later comments stay in the file."""
    split = generator("recipes_page").split
    text, body = split("# LoRA, small.\n# graft sft a.toml\n\nrank = 8  # thin\n# end\n")
    assert text == "LoRA, small.\n\n```bash\ngraft sft a.toml\n```"
    assert body == "rank = 8  # thin\n# end"


def test_a_missing_recipe_folder_is_no_page(
    generator: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law: without recipes there is no page of them; with one there is, and it holds the file."""
    recipes = generator("recipes_page")
    monkeypatch.setattr(recipes, "FOLDER", tmp_path)
    assert recipes.page() is None
    (tmp_path / "a-0.1b.toml").write_text(
        '# Small.\nbase = "b"\nmethod = "lora"\n[recipe]\ngpu_gb = 8\npredicted_gib = 1.5\n', encoding="utf-8"
    )
    page = recipes.page()
    assert "| [a-0.1b](#a-01b) | b | lora | 8 | 1.5 |" in page
    assert '## a-0.1b\n\nSmall.\n\n```toml\nbase = "b"\n' in page


def test_the_page_of_models_is_the_table(generator: Callable[[str], ModuleType]) -> None:
    """Law: every architecture that a config may name, and every preset, stands on the page."""
    from graft.base.model.families import FAMILIES
    from graft.base.model.presets import PRESETS

    page = generator("models_page").page()
    assert all(f"| `{name}` |" in page for name in (*FAMILIES, *PRESETS))


def test_the_page_of_depths_has_the_recipes_numbers(generator: Callable[[str], ModuleType]) -> None:
    """By hand: depth 6 is 384 wide; 20 tokens a parameter; presets are below it."""
    page = generator("depths_page")
    page.DEPTHS, page.SMALL = (6,), ("nano",)
    text = page.page()
    [row] = [line for line in text.splitlines() if line.startswith("| 6 |")]
    cells = [cell.strip() for cell in row.strip("| ").split("|")]
    assert cells[1:5] == ["384", "12,883,584", "2.58e+08", "256"]
    assert cells[7].endswith("GiB")
    assert "| `nano` | 128 |" in text


def test_the_notebooks_page_has_its_cells(generator: Callable[[str], ModuleType]) -> None:
    """Law: text, code and saved output of each cell are on the page."""
    page = generator("notebook_page").page()
    raw = json.loads((ROOT / "docs/notebook.ipynb").read_text(encoding="utf-8"))
    for cell in raw["cells"]:
        assert "".join(cell["source"]) in page
    assert page.startswith("# From raw text to swapped adapters")
    assert "6 of 6 right" in page
