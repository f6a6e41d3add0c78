"""The notebook as a page: text cells as they are, code cells as blocks with the output that was saved with them."""

import json
from pathlib import Path

FILE = Path(__file__).parent / "notebook.ipynb"


def cells() -> list[tuple[str, str, str]]:
    """(markdown or code, source, saved text output) for each cell."""
    found = []
    for cell in json.loads(FILE.read_text(encoding="utf-8"))["cells"]:
        output = "".join("".join(part.get("text", [])) for part in cell.get("outputs", []))
        found.append((cell["cell_type"], "".join(cell["source"]), output))
    return found


def page() -> str:
    """Markdown."""
    lines = []
    for kind, source, output in cells():
        if kind == "markdown":
            lines += [source, ""]
        else:
            lines += ["```python", source, "```", ""]
            lines += ["```text", output.rstrip(), "```", ""] if output.strip() else []
    return "\n".join(lines)
