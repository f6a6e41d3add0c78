"""The page of the recipes: each TOML file of finetune/recipes, its leading comment as text, the rest as it stands.

A recipe's table [recipe] says for which GPU it is (gpu_gb) and the memory that is predicted for it (predicted_gib).
"""

import tomllib
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "finetune" / "recipes"


def files() -> list[Path]:
    """The recipes, by name; none where the folder is missing."""
    return sorted(FOLDER.rglob("*.toml"))


def page() -> str | None:
    """Markdown; None without a recipe."""
    if not files():
        return None
    lines = [
        "# Recipes",
        "",
        "Configs to start from. The keys are those of the command's page; a flag or `--set key=value` overrides a key.",
        "",
        "| recipe | base | method | GPU, GB | predicted peak, GiB |",
        "| --- | --- | --- | --- | --- |",
        *map(_overview, files()),
        "",
    ]
    for file in files():
        text, body = split(file.read_text(encoding="utf-8"))
        lines += [f"## {file.stem}", "", text, "", "```toml", body, "```", ""]
    return "\n".join(lines)


def _overview(file: Path) -> str:
    raw: dict[str, Any] = tomllib.loads(file.read_text(encoding="utf-8"))
    said = raw.get("recipe", {})
    cells = [raw.get("base", ""), raw.get("method", ""), said.get("gpu_gb", ""), said.get("predicted_gib", "")]
    return f"| [{file.stem}](#{file.stem.replace('.', '')}) | {' | '.join(map(str, cells))} |"


def split(source: str) -> tuple[str, str]:
    """(the comment lines at the top as Markdown, the rest). A comment line that begins with graft is a command."""
    lines = source.splitlines()
    top = 0
    while top < len(lines) and (lines[top].startswith("#") or not lines[top].strip()):
        top += 1
    text = [line.removeprefix("#").strip() for line in lines[:top]]
    shown = [f"\n```bash\n{line}\n```\n" if line.startswith("graft ") else line for line in text]
    return "\n".join(shown).strip(), "\n".join(lines[top:]).strip()
