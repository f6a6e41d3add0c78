"""Files are whole or absent."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from graft.base.checkpoint import (
    beside,
    folder_beside,
    iterate_tensors,
    load_tensors,
    random_state,
    save_tensors,
    set_random_state,
    write_file,
    write_json,
)
from graft.base.json_fields import read_json
from graft.base.run import Input
from graft.base.settings import read_toml


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    """Law: an exception while writing changes nothing and leaves no rubbish."""
    write_file(tmp_path / "a", "old")
    with pytest.raises(RuntimeError), beside(tmp_path / "a") as temporary:  # noqa: PT012
        temporary.write_text("half")
        raise RuntimeError("power cut")
    with pytest.raises(RuntimeError), folder_beside(tmp_path / "folder") as temporary:  # noqa: PT012
        (temporary / "x").write_text("half")
        raise RuntimeError("power cut")
    assert (tmp_path / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_folder_appears_whole_and_is_never_replaced(tmp_path: Path) -> None:
    with folder_beside(tmp_path / "f") as temporary:
        (temporary / "x").write_text("1")
        assert not (tmp_path / "f").exists()
    assert (tmp_path / "f/x").read_text() == "1"
    with pytest.raises(FileExistsError, match="f exists already"), folder_beside(tmp_path / "f"):
        pass


FULL_DISK = """
import resource, sys, torch
from pathlib import Path
from graft.base.checkpoint import save_tensors, write_json
folder = Path(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
for write in (
    lambda: save_tensors(folder / "w.safetensors", {"w": torch.ones(100_000)}),
    lambda: write_json(folder / "w.json", {"x": "y" * 10_000}),
):
    try:
        write()
    except OSError as error:
        print("OSError", error)
"""


def test_a_full_disk_is_an_oserror_and_the_old_file_stays(tmp_path: Path) -> None:
    """Law: with a file size limit in place of a full disk, both writers raise OSError and keep what was there."""
    save_tensors(tmp_path / "w.safetensors", {"w": torch.zeros(2)})
    write_json(tmp_path / "w.json", {"x": 1})
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.count("OSError") == 2, done.stdout + done.stderr
    assert torch.equal(load_tensors(tmp_path / "w.safetensors")["w"], torch.zeros(2))
    assert read_json(tmp_path / "w.json") == {"x": 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["w.json", "w.safetensors"]


def test_reading_what_is_not_there_or_broken(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"a\.safetensors does not exist"):
        load_tensors(tmp_path / "a.safetensors")
    save_tensors(tmp_path / "a.safetensors", {"w": torch.ones(100)})
    whole = (tmp_path / "a.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(whole[:-7])
    with pytest.raises(ValueError, match="truncated or no safetensors file"):
        list(iterate_tensors(tmp_path / "a.safetensors"))
    with pytest.raises(FileNotFoundError, match=r"x\.json does not exist"):
        read_json(tmp_path / "x.json")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        read_json(tmp_path)
    (tmp_path / "x.json").write_text('{"a": 1,\n oops}')
    with pytest.raises(ValueError, match=r"x\.json line 2: not JSON"):
        read_json(tmp_path / "x.json")
    (tmp_path / "x.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ValueError, match="not UTF-8 at byte 7"):
        read_json(tmp_path / "x.json")
    (tmp_path / "x.json").write_text(json.dumps([1]))
    with pytest.raises(ValueError, match="holds a list"):
        read_json(tmp_path / "x.json")


def test_random_state_round_trip() -> None:
    """Law: after putting the state back the same numbers come."""
    torch.manual_seed(7)
    state = random_state()
    first = torch.rand(3)
    set_random_state(state)
    assert torch.equal(torch.rand(3), first)


def test_what_is_renamed_is_on_disk_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: a file is flushed before the rename gives it its name, and the folder's entry after it."""
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def flushed(handle: int) -> None:
        calls.append("flush folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "flush file")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", lambda *paths: (calls.append("rename"), replace(*paths)))
    for write in (
        lambda: write_json(tmp_path / "a.json", {}),
        lambda: save_tensors(tmp_path / "a.safetensors", {"w": torch.ones(2)}),
    ):
        calls.clear()
        write()
        assert calls == ["flush file", "rename", "flush folder"]
    calls.clear()
    with folder_beside(tmp_path / "folder") as temporary:
        write_json(temporary / "a.json", {})
    assert calls == ["flush file", "rename", "flush folder", "flush folder", "rename", "flush folder"]


def test_a_fifo_is_refused(tmp_path: Path) -> None:
    """Law: a pipe in place of a file is an error at once: reading it would wait for ever."""
    os.mkfifo(tmp_path / "x.json")
    with pytest.raises(ValueError, match=r"x\.json is not a regular file"):
        read_json(tmp_path / "x.json")
    with pytest.raises(ValueError, match=r"x\.json is not a regular file"):
        read_toml(tmp_path / "x.json")
    with pytest.raises(FileNotFoundError, match=r"x\.json does not exist or is not a regular file"):
        Input.of(tmp_path / "x.json")


WITHOUT_UNIX = """
import sys
for name in ("resource", "fcntl", "pwd", "grp", "termios"):
    sys.modules[name] = None
import graft.base.pretrain, graft.base.device, graft.base.runlog, graft.finetune.sft
print(graft.base.device.peak_bytes("cpu"))
"""


def test_imports_without_unix_modules() -> None:
    """Law: training imports where Python has no resource and fcntl (Windows), and reports no peak there."""
    done = subprocess.run([sys.executable, "-c", WITHOUT_UNIX], capture_output=True, text=True)
    assert done.stdout == "{}\n", done.stderr
