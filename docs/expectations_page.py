"""The page 'What users expect', from expectations.csv: one row an expectation, graft's state, where it is, which peers have it.

A state is yes, partly, no or out of scope. To change one, edit the CSV; every count on the page is computed from it.
"""

import csv
from collections import Counter
from pathlib import Path

FILE = Path(__file__).parent / "expectations.csv"
STATES = ("yes", "partly", "no", "out of scope")
PEERS = ("axolotl", "LLaMA-Factory", "TRL+PEFT", "Unsloth", "torchtune", "litgpt", "nanochat")
READ = (
    "TRL + PEFT 2026-07/08, axolotl 2026-07, Unsloth 2026-08, LLaMA-Factory 2026-08, litgpt 2026-06, torchtune 2026-04, "
    "nanochat 2026-07"
)


def rows() -> list[dict[str, str]]:
    """The table's rows, in order."""
    with FILE.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def peers_of(cell: str) -> list[str]:
    """'axolotl, Unsloth' -> ['axolotl', 'Unsloth']"""
    return [name.strip() for name in cell.split(",") if name.strip()]


def counts() -> dict[str, Counter[str]]:
    """For graft and each peer: how many expectations it meets fully, partly or not."""
    table = rows()
    found = {"graft": Counter(row["state"] for row in table)}
    for peer in PEERS:
        states = [
            "yes" if peer in peers_of(row["yes_by"]) else "partly" if peer in peers_of(row["partly_by"]) else "no"
            for row in table
        ]
        found[peer] = Counter(states)
    return found


def page() -> str:
    """Markdown: the counts, what is out of scope, the table."""
    table, counted = rows(), counts()
    out = [row["expectation"] for row in table if row["state"] == "out of scope"]
    lines = [
        "# What users expect",
        "",
        f"{len(table)} things that users of the best-known training libraries find there, and whether graft has them. graft's "
        "column is checked against this version of the code; the peers' columns were read from their repositories as of "
        f"{READ}. A peer may have gained something since.",
        "",
        "| | yes | partly | no | out of scope |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name in sorted(counted, key=lambda name: -counted[name]["yes"]):
        label = f"**{name}**" if name == "graft" else name
        cells = [str(counted[name][state]) for state in STATES[:3]]
        lines.append(f"| {label} | {' | '.join(cells)} | {counted[name]['out of scope'] or ''} |")
    lines += [
        "",
        f"Out of scope, so nobody should wait for it: {'; '.join(out)}.",
        "",
        "| what users expect | graft | where, or what is missing | peers that have it | partly |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in table:
        cells = [row[column] for column in ("expectation", "state", "note", "yes_by", "partly_by")]
        cells[1] = f"**{cells[1]}**" if cells[1] == "yes" else cells[1]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join([*lines, ""])
