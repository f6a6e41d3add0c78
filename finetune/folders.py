"""Model folders as a whole: replaced only when the new one is complete, and what a base's folder says beside its weights."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ..base.checkpoint import write_file, write_json
from ..base.json_fields import read_json
from ..base.runlog import remove_others

GENERATION = "generation_config.json"
LICENSES = ("LICENSE*", "NOTICE*", "USE_POLICY*")  # what binds the base binds what is made of it


@contextmanager
def replaced_folder(out: Path | str) -> Iterator[Path]:
    """An empty folder to write into, which takes the place of `out` when the block ends well; else `out` is as it was.

    Files of `out` that a reader would load and that were not written now are removed, after the new ones are in place;
    all others stay. A refused run leaves nothing behind, also no empty folder.
    """
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        if not out.exists():
            os.replace(temporary, out)
            return
        written = sorted(path.name for path in temporary.iterdir())
        # config.json last: until it changes, the folder is the older model's or refused for weights that do not fit
        for name in sorted(written, key="config.json".__eq__):
            os.replace(temporary / name, out / name)
        remove_others(out, written)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def carry_over(base: Path | str, out: Path | str) -> None:
    """What a base's folder says that stays true of a model made from it: generation settings and licenses.

    Call it when `out`'s own files are written. generation_config.json keeps the base's sampling defaults and stop ids; stop
    ids that `out` adds (the end of a turn that was taught) join them.
    """
    base, out = Path(base), Path(out)
    for path in sorted(base.iterdir()):
        if path.is_file() and any(fnmatch(path.name, pattern) for pattern in LICENSES):
            write_file(out / path.name, path.read_bytes())
    if not (base / GENERATION).exists():
        return
    settings = read_json(base / GENERATION)
    own = read_json(out / GENERATION) if (out / GENERATION).exists() else {}
    added, before = _ids(own, out / GENERATION), _ids(settings, base / GENERATION)
    ends = added if set(before) <= set(added) else [*before, *added]  # a full list stands as it was written
    merged = own | settings
    if len(unique := list(dict.fromkeys(ends))) > len(set(_ids(settings, base / GENERATION))):
        merged["eos_token_id"] = unique if len(unique) > 1 else unique[0]
    write_json(out / GENERATION, merged)


def _ids(settings: dict[str, Any], path: Path) -> list[int]:
    """eos_token_id, which may be missing, one id or a list."""
    value = settings.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if wrong := [one for one in ids if type(one) is not int]:
        raise ValueError(f"{path}: eos_token_id {wrong[0]!r} is no id; expected a whole number or a list of them")
    return ids
