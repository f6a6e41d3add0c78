"""What must be equal on all ranks, compared when they have met: versions, settings, files, and that they see one folder."""

import hashlib
import json
import os
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from ..run import Run, settings_of
from ..runlog import versions
from .ranks import Ranks, watch

SEEN_S = 10.0  # for a file to appear on another machine's network disk
SHOWN = 3  # differences that a message names


def check_same(ranks: Ranks, facts: Mapping[str, Any]) -> None:
    """Raise ValueError on every rank when one has other facts than rank 0, naming it, the fact and both values.

    The values are compared as JSON. Without other ranks it does nothing.
    """
    if ranks.n == 1:
        return
    store = watch().store
    store.set(f"facts/{ranks.rank}", json.dumps(facts, default=str))
    ranks.wait()
    first = json.loads(store.get("facts/0"))
    # Only rank 0 reads all of them; every other rank speaks for itself.
    others = range(1, ranks.n) if ranks.is_first else [ranks.rank]
    found = []
    for rank in others:
        own = json.loads(store.get(f"facts/{rank}"))
        differing = [name for name in sorted(first.keys() | own.keys()) if first.get(name) != own.get(name)]
        if differing:
            shown = ", ".join(f"{name} {own.get(name)!r} instead of {first.get(name)!r}" for name in differing[:SHOWN])
            more = f" and {len(differing) - SHOWN} more" if len(differing) > SHOWN else ""
            found.append(f"rank {rank} has {shown}{more}")
    if ranks.sum(float(bool(found))) != [0.0]:
        message = "; ".join(found) or "a rank differs from rank 0; its message says in what"
        raise ValueError(f"ranks must not differ: {message}; give every rank the same versions, settings and files")


def facts_of(config: Run) -> dict[str, Any]:
    """What must be equal on all ranks of a run: versions, sources, every setting, and the inputs by content wherever they lie."""
    inputs = {name: given.sha256[:12] for name, given in config.inputs.items()}
    return {**versions(), "graft's sources": source_fingerprint(), **settings_of(config.saved()), **inputs}


@cache
def source_fingerprint() -> str:
    """The first 12 digits of the SHA-256 of graft's own sources: a version's number doesn't tell an edited clone."""
    root = Path(__file__).parents[2]
    whole = hashlib.sha256()
    for layer in ("base", "finetune", "kernels", "quant"):
        for path in sorted((root / layer).rglob("*.py")):
            whole.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return whole.hexdigest()[:12]


def check_visible(ranks: Ranks, folder: Path) -> None:
    """Raise ValueError on every rank when one can't see a file that rank 0 puts into the folder for a moment."""
    if ranks.n == 1:
        return
    mark = folder / f".seen.{ranks.most(os.getpid() if ranks.is_first else 0)}.tmp"
    if ranks.is_first:
        mark.touch()
    try:
        ranks.wait()
        until, seen = time.monotonic() + SEEN_S, mark.exists()
        while not seen and time.monotonic() < until:
            time.sleep(0.2)
            seen = mark.exists()
        blind = [rank for rank, misses in enumerate(ranks.each(float(not seen))) if misses]
    finally:
        if ranks.is_first:
            mark.unlink(missing_ok=True)
    if blind:
        names = ", ".join(map(str, blind))
        raise ValueError(f"rank {names} can't see {folder}, which rank 0 writes; put it on a disk that all ranks share")
