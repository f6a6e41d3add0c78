"""Law: imports point down (STYLE.md section 1), inside the package they are relative, and only cli.py may see everything."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "finetune": {"finetune", "base", "quant", "kernels"},
    "base": {"base", "kernels"},
    "quant": {"quant", "kernels"},
    "kernels": {"kernels"},
}


def imports_of(path: Path) -> list[tuple[int, str]]:
    """Each import of our own as (line, dotted path below the root)."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names if alias.name.split(".")[0] == "graft"]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                package = parts[: len(parts) - node.level]
                names = [node.module] if node.module else [alias.name for alias in node.names]
                found += [(node.lineno, ".".join((*package, name))) for name in names if name]
            elif node.module and node.module.split(".")[0] == "graft":
                found.append((node.lineno, node.module))
    return found


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def test_arrows_point_down() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {target}"
        for folder, allowed in MAY_IMPORT.items()
        for path in sources(folder)
        for line, target in imports_of(path)
        if target.split(".")[0] not in allowed
    ]
    assert not wrong, "\n".join(wrong)


def test_every_folder_was_walked() -> None:
    """The test above can fail: each layer has sources, and some of them import another layer."""
    assert all(sources(folder) for folder in MAY_IMPORT)
    crossing = [
        t for folder in MAY_IMPORT for p in sources(folder) for _, t in imports_of(p) if t.split(".")[0] != folder
    ]
    assert crossing


def folder_arrows() -> dict[str, set[str]]:
    """Which folder imports which other, at module level or inside a function; type-checking imports count too."""
    arrows: dict[str, set[str]] = {}
    for layer in MAY_IMPORT:
        for path in sources(layer):
            folder = ".".join(path.relative_to(ROOT).parent.parts)
            for _, target in imports_of(path):
                parts = target.split(".")
                while parts and not (ROOT / Path(*parts)).is_dir():
                    parts.pop()
                other = ".".join(parts)
                # A folder and the one it lies in are one neighbourhood: base/train.py uses base/optim/, base/optim/ a base/ file.
                if (
                    other
                    and other != folder
                    and not f"{other}.".startswith(f"{folder}.")
                    and not f"{folder}.".startswith(f"{other}.")
                ):
                    arrows.setdefault(folder, set()).add(other)
    return arrows


def test_folders_import_in_one_direction() -> None:
    """Law: no circle of folders, so that each can be read after those that it stands on."""
    arrows = folder_arrows()
    assert arrows, "no folder imports another: the walk is broken"
    state: dict[str, int] = {}  # 1: on the path, 2: done
    circles = []

    def visit(folder: str, path: list[str]) -> None:
        if state.get(folder) == 2:
            return
        if state.get(folder) == 1:
            circles.append(" -> ".join([*path[path.index(folder) :], folder]))
            return
        state[folder] = 1
        for other in sorted(arrows.get(folder, ())):
            visit(other, [*path, folder])
        state[folder] = 2

    for folder in sorted(arrows):
        visit(folder, [])
    assert not circles, "\n".join(circles)
