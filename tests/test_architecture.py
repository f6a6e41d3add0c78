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
