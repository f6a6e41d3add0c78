"""MkDocs calls these: they add the pages that are generated from the code, so that those can't go stale.

`on_config` completes the navigation, `on_files` adds the pages. mkdocs.yml names this file; nothing here is copied into the site.
"""

import shutil
import sys
import tempfile
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PARTS = ("base", "quant", "kernels", "finetune")  # of the package that lies at the repository's root

SOURCES = Path(tempfile.mkdtemp(prefix="graft-docs-"))  # a copy of the package under its own name, which griffe needs
sys.path.insert(0, str(SOURCES))


def copy_sources() -> None:
    """The package's sources as SOURCES/graft: the pages are then about this tree, whatever is installed."""
    shutil.rmtree(SOURCES / "graft", ignore_errors=True)
    (SOURCES / "graft").mkdir(parents=True)
    for file in ROOT.glob("*.py"):
        shutil.copy(file, SOURCES / "graft")
    for part in PARTS:
        shutil.copytree(ROOT / part, SOURCES / "graft" / part, ignore=shutil.ignore_patterns("__pycache__"))


copy_sources()

import api_page  # noqa: E402
import command_pages  # noqa: E402 (they lie beside this file, and import graft)
import depths_page  # noqa: E402
import expectations_page  # noqa: E402
import models_page  # noqa: E402
import notebook_page  # noqa: E402
import recipes_page  # noqa: E402


def generated_pages() -> dict[str, str]:
    """Path below the site's root -> Markdown. A page that has nothing to show yet is left out."""
    found = {
        **command_pages.pages(),
        "api.md": api_page.page(),
        "expectations.md": expectations_page.page(),
        "models.md": models_page.page(),
        "depths.md": depths_page.page(),
        "recipes.md": recipes_page.page(),
        "notebook.md": notebook_page.page(),
        "log.md": (ROOT / "LOG.md").read_text(encoding="utf-8"),
        "changelog.md": (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"),
    }
    return {path: text for path, text in found.items() if text is not None}


PAGES: dict[str, str] = {}


@event_priority(100)  # before mkdocstrings reads its config
def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Generate the pages, complete the navigation, and show griffe the sources."""
    copy_sources()
    PAGES.clear()
    PAGES.update(generated_pages())
    config.nav = _completed(config.nav or [])
    handlers = config.plugins["mkdocstrings"].config.handlers
    handlers["python"]["paths"] = [str(SOURCES)]
    return config


def _completed(entries: list) -> list:
    """The navigation without pages that don't exist, and with one entry a command."""
    kept = []
    for entry in entries:
        [(title, target)] = entry.items()
        if target == "commands/":
            kept.append({title: command_pages.navigation(PAGES)})
        elif isinstance(target, list):
            kept.append({title: _completed(target)})
        elif target in PAGES or (ROOT / "docs" / target).exists():
            kept.append(entry)
    return kept


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages. A page of that name in docs/ would be shadowed, so it is an error."""
    for path, text in PAGES.items():
        if files.get_file_from_path(path) is not None:
            raise ValueError(f"docs/{path} would hide the page that is generated; remove the file")
        files.append(File.generated(config, path, content=text))
    return files


def on_post_build(config: MkDocsConfig) -> None:
    """Remove the copy of the sources."""
    del config
    shutil.rmtree(SOURCES, ignore_errors=True)
