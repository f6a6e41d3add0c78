"""The table of what users expect: every state has its evidence in the tree, every count is computed from the rows."""

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer.main

import graft
from graft.base.run import TrainConfig
from graft.base.settings import describe
from graft.cli import app

ROOT = Path(graft.__file__).parent


@pytest.fixture
def table(generator: Callable[[str], ModuleType]) -> ModuleType:
    return generator("expectations_page")


def is_there(evidence: str, keys: set[str]) -> bool:
    """Whether a code span names a command, a file or folder of the tree, or a config key."""
    if evidence.startswith("graft "):
        command: Any = typer.main.get_command(app)
        words = evidence.split()[1:]
        while words and hasattr(command, "commands"):
            command, words = command.commands.get(words[0]), words[1:]
        options = {name for p in getattr(command, "params", ()) for name in (*p.opts, *p.secondary_opts)}
        return command is not None and {word for word in words if word.startswith("--")} <= options
    return evidence in keys or ((ROOT / evidence).exists() and not evidence.startswith("/"))


def test_each_state_is_known_and_has_evidence(table: ModuleType) -> None:
    """Law: 77 rows, each once; what is marked yes or partly names at least one command, file or key, and each of them exists."""
    from graft.finetune.sft import PARTS

    keys = {key.name for kind in PARTS.values() for key in describe(kind)}
    assert "packing" in keys
    rows = table.rows()
    assert len(rows) == len({row["expectation"] for row in rows}) == 77
    for row in rows:
        assert row["state"] in table.STATES, row
        spans = re.findall(r"`([^`]+)`", row["note"])
        lost = [span for span in spans if not is_there(span, keys)]
        assert not lost, f"{row['expectation']}: {lost}"
        if row["state"] == "yes":
            assert spans, f"{row['expectation']}: yes, and nothing says where"
        if row["state"] == "partly":
            assert row["note"], f"{row['expectation']}: partly, and nothing says what is missing"


def test_evidence_can_be_lost() -> None:
    """The test above can fail: a command, an option, a file and a key that don't exist are told from those that do."""
    keys = {key.name for key in describe(TrainConfig)}
    assert all(is_there(one, keys) for one in ("graft sft --lora", "finetune/sft.py", "kernels/", "patience"))
    assert not any(is_there(one, keys) for one in ("graft tune", "graft sft --dora", "finetune/tune.py", "patient"))


def test_the_page_counts_its_rows(table: ModuleType) -> None:
    """Law: the counts on the page are those of its own table; the peers' are those of the comparison of 2026-11-25."""
    counts = table.counts()
    published = {"axolotl": 60, "LLaMA-Factory": 58, "TRL+PEFT": 52, "Unsloth": 49, "torchtune": 36, "litgpt": 32}
    assert {peer: counts[peer]["yes"] for peer in published} == published
    assert counts["nanochat"]["yes"] == 24
    for peer in table.PEERS:
        assert counts[peer]["partly"] == sum(peer in row["partly_by"].split(", ") for row in table.rows()), peer
    page = table.page()
    body = [line.split(" | ") for line in page.splitlines() if line.startswith("| ") and line.count(" | ") == 4]
    body = [cells for cells in body if cells[0] != "|" and cells[1].strip("*") in table.STATES]
    assert len(body) == 77
    for name, counted in counts.items():
        assert sum(counted.values()) == 77, name
    seen = Counter(cells[1].strip("*") for cells in body)
    assert seen == counts["graft"]
    cells = [str(seen[state]) for state in ("yes", "partly", "no", "out of scope")]
    assert f"| **graft** | {' | '.join(cells)} |" in page
    for row in table.rows():
        assert (
            row["state"] != "out of scope"
            or f"{row['expectation']}" in page.partition("Out of scope")[2].split("\n")[0]
        )


def test_each_peer_is_known(table: ModuleType) -> None:
    """Law: a misspelt peer would be counted nowhere; none has an expectation both fully and partly."""
    for row in table.rows():
        full, part = table.peers_of(row["yes_by"]), table.peers_of(row["partly_by"])
        assert {*full, *part} <= set(table.PEERS), row
        assert not set(full) & set(part), row
