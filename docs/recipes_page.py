"""The page of the recipes: each TOML file of finetune/recipes, its leading comment as text, the rest as it stands."""

from pathlib import Path

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
        "Configs to start from. Each is a TOML file whose keys are those of the command's page; a flag or `--set key=value` "
        "overrides a key. The files are installed with the package, in `graft/finetune/recipes`.",
        "",
    ]
    for file in files():
        text, body = split(file.read_text(encoding="utf-8"))
        lines += [f"## {file.relative_to(FOLDER).as_posix()}", "", text, "", "```toml", body, "```", ""]
    return "\n".join(lines)


def split(source: str) -> tuple[str, str]:
    """(the comment lines at the top as text, the rest). Commands in the comment, indented below a `#`, stay on their lines."""
    lines = source.splitlines()
    top = 0
    while top < len(lines) and (lines[top].startswith("#") or not lines[top].strip()):
        top += 1
    text = "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines[:top])
    return text.strip(), "\n".join(lines[top:]).strip()
