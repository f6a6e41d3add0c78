"""A checkpoint that many ranks write: safetensors files by rank and index.json, which says what of each tensor is where.

    step-00000200/
      weights-00001-of-00004.safetensors     each rank's pieces of the trained weights, under the parameters' names
      optimizer-00001-of-00004.safetensors   and of the optimizer's state
      index.json                             {"n_ranks": 4, "weights": {name: {"shape", "pieces": [{"file", "start", "size"}]}}}

The folder has its name when every rank has written its files. It is read piece by piece, by any number of ranks.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import flush, naming, save_tensors, write_json
from ..json_fields import read_json
from .optimizer import ShardedOptimizer
from .ranks import Ranks

INDEX = "index.json"
KINDS = ("weights", "optimizer")
Box = tuple[tuple[int, int], ...]  # [start, end) in each dimension


# --- writing -------------------------------------------------------------------------------------------------------


def write_together(target: Path, ranks: Ranks, write: Callable[[Path], None], finish: Callable[[Path], None]) -> None:
    """Make a folder to which every rank writes by `write`, and rank 0 by `finish` when all have: under its name or not at all.

    Raises OSError on every rank when one of them could not write.
    """
    temporary = target.with_name(f".{target.name}.tmp")

    def prepare() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)

    def end() -> None:
        finish(temporary)
        flush(temporary)
        os.replace(temporary, target)
        flush(target.parent)

    for action in (prepare if ranks.is_first else None, lambda: write(temporary), end if ranks.is_first else None):
        error: OSError | None = None
        try:
            with naming(target):
                if action is not None:
                    action()
        except OSError as raised:
            error = raised
        if ranks.most(error is not None):
            if ranks.is_first:
                shutil.rmtree(temporary, ignore_errors=True)
            raise error or OSError(f"{target}: another rank could not write its part; its message says why")


def write_pieces(folder: Path, optimizer: ShardedOptimizer) -> None:
    """This rank's files of a checkpoint."""
    ranks = optimizer.sharding.mesh.ranks
    for kind, tensors in zip(KINDS, (dict(optimizer.named), optimizer.state_tensors()), strict=True):
        mine, places = {}, {}
        for name, tensor in tensors.items():
            if name.startswith("n_steps"):  # the same number for every parameter, as each has a gradient at every step
                if tensor.numel():
                    mine[name], places[name] = tensor.max(), {"start": [], "shape": []}
                continue
            box, writes = _place(optimizer, name, tensor)
            if writes and tensor.numel():
                shape = _shape(optimizer, name, tensor)
                mine[name], places[name] = tensor, {"start": [start for start, _ in box], "shape": shape}
        if mine:
            file = folder / f"{kind}-{ranks.rank + 1:05d}-of-{ranks.n:05d}.safetensors"
            save_tensors(file, mine, metadata={"places": json.dumps(places)})


def _parameter(optimizer: ShardedOptimizer, name: str, tensor: Tensor) -> str | None:
    """The parameter whose piece a tensor has the shape of: itself, or one whose state this is."""
    owner = name if name in optimizer.pieces else name.rpartition(".")[0]
    local = dict(optimizer.named).get(owner)
    return owner if local is not None and local.shape == tensor.shape else None


def _place(optimizer: ShardedOptimizer, name: str, tensor: Tensor) -> tuple[Box, bool]:
    """Which part of a whole tensor of weights or state is on this rank, and whether this rank writes it."""
    parameter = _parameter(optimizer, name, tensor)
    if parameter is not None:
        return optimizer.box(parameter), optimizer.writes(parameter)
    # State of another shape than its parameter: of a matrix that one rank updates whole, such as SOAP's bases.
    owner = next((known for known in optimizer.pieces if name.startswith(f"{known}.")), None)
    return tuple((0, size) for size in tensor.shape), owner is None or optimizer.writes(owner)


def _shape(optimizer: ShardedOptimizer, name: str, tensor: Tensor) -> list[int]:
    parameter = _parameter(optimizer, name, tensor)
    return list(optimizer.pieces[parameter].shape if parameter is not None else tensor.shape)


def write_index(folder: Path, n_ranks: int) -> None:
    """index.json from the headers of the files that the ranks wrote."""
    from safetensors import safe_open

    index: dict[str, Any] = {"n_ranks": n_ranks, **{kind: {} for kind in KINDS}}
    for kind in KINDS:
        for file in sorted(folder.glob(f"{kind}-*.safetensors")):
            with safe_open(file, framework="pt") as opened:
                places = json.loads(opened.metadata()["places"])
                for name, place in places.items():
                    entry = index[kind].setdefault(name, {"shape": place["shape"], "pieces": []})
                    size = opened.get_slice(name).get_shape()
                    entry["pieces"].append({"file": file.name, "start": place["start"], "size": size})
    write_json(folder / INDEX, index)


# --- reading -------------------------------------------------------------------------------------------------------


class Pieces:
    """The tensors of one kind in a checkpoint, whoever wrote it: whole ones in one file, or pieces in a file a rank.

    Raises FileNotFoundError that names a rank's file which is missing.
    """

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder, self.kind = folder, kind
        self._entries: dict[str, dict[str, Any]] | None = None
        if (folder / INDEX).exists():
            index = read_json(folder / INDEX, {"n_ranks": int, **dict.fromkeys(KINDS, dict)})
            self._entries = index[kind]
            self._check_files(index["n_ranks"])
        self._opened: dict[str, Any] = {}

    def _check_files(self, n_ranks: int) -> None:
        assert self._entries is not None
        for file in sorted({piece["file"] for entry in self._entries.values() for piece in entry["pieces"]}):
            if Path(file).name != file:
                raise ValueError(f"{self.folder / INDEX} names {file!r}; expected files of the same folder")
            if not (self.folder / file).is_file():
                rank = int(file.split("-")[1]) - 1
                raise FileNotFoundError(
                    f"{self.folder} lacks {file}, which rank {rank} of {n_ranks} wrote; copy it back, or remove {self.folder} "
                    "to go on from the checkpoint before it"
                )

    def _open(self, file: str) -> Any:
        from safetensors import SafetensorError, safe_open

        if file not in self._opened:
            try:
                self._opened[file] = safe_open(self.folder / file, framework="pt")
            except SafetensorError as error:
                raise ValueError(
                    f"{self.folder / file} is truncated or no safetensors file ({error}); copy it again"
                ) from None
        return self._opened[file]

    def names(self) -> Iterator[str]:
        """The tensors that are there."""
        yield from self._open(f"{self.kind}.safetensors").keys() if self._entries is None else self._entries

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Of the whole tensor; None when there is none of this name."""
        if self._entries is not None:
            return tuple(self._entries[name]["shape"]) if name in self._entries else None
        opened = self._open(f"{self.kind}.safetensors")
        return tuple(opened.get_slice(name).get_shape()) if name in opened.keys() else None  # noqa: SIM118

    def read(self, name: str, box: Box | None = None) -> Tensor:
        """A tensor, or the part of it in `box`. Raises ValueError when the files don't hold all of it."""
        shape = self.shape(name)
        if shape is None:
            raise ValueError(
                f"{self.folder} does not fit this model: {name} is not there; resume with the run's own config"
            )
        box = box if box is not None else tuple((0, size) for size in shape)
        if self._entries is not None:
            pieces = self._entries[name]["pieces"]
        else:
            pieces = [{"file": f"{self.kind}.safetensors", "start": [0] * len(shape), "size": list(shape)}]
        made: Tensor | None = None
        n_read = 0
        for piece in pieces:
            there = tuple((start, start + size) for start, size in zip(piece["start"], piece["size"], strict=True))
            both = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(box, there, strict=True))
            if any(low >= high for low, high in both):
                continue
            opened = self._open(piece["file"])
            part = opened.get_slice(name)[_within(both, there)] if both else opened.get_tensor(name)
            if made is None:
                made = torch.empty([end - start for start, end in box], dtype=part.dtype)
            made[_within(both, box)] = part
            n_read += part.numel()
        if made is None and any(start == end for start, end in box):
            return torch.empty([end - start for start, end in box])  # a rank beyond the last row
        if made is None or n_read < made.numel():
            raise ValueError(f"{self.folder / INDEX} doesn't say where all of {name} is; the checkpoint is damaged")
        return made


def _within(box: Box, outer: Box) -> tuple[slice, ...]:
    """The slices of a tensor that is `outer`, of the numbers in `box`."""
    return tuple(slice(low - start, high - start) for (low, high), (start, _) in zip(box, outer, strict=True))


@torch.no_grad()
def read_weights(folder: Path, optimizer: Any) -> None:
    """Copy a checkpoint's weights into what an optimizer trains on this rank."""
    saved = Pieces(folder, "weights")
    whole = optimizer if isinstance(optimizer, ShardedOptimizer) else None
    for name, tensor in optimizer.named:
        expected = tuple(whole.pieces[name].shape if whole is not None else tensor.shape)
        if saved.shape(name) != expected:
            raise ValueError(f"{folder} does not fit this model: weight {name}; resume with the run's own config")
        tensor.copy_(saved.read(name, whole.box(name) if whole is not None else None))
    if whole is not None:
        whole.publish_()


def read_state(folder: Path, optimizer: Any) -> dict[str, Tensor]:
    """The optimizer's state for this rank, as its `load_state_tensors` takes it."""
    saved = Pieces(folder, "optimizer")
    if not isinstance(optimizer, ShardedOptimizer):
        return {name: saved.read(name) for name in saved.names()}
    state: dict[str, Tensor] = {}
    own: Mapping[str, Tensor] = optimizer.state_tensors()
    for name, tensor in own.items():
        if name.startswith("n_steps"):
            state[name] = (
                saved.read(name).max() if saved.shape(name) is not None else torch.zeros((), dtype=torch.int64)
            )
        else:
            box, _ = _place(optimizer, name, tensor)
            state[name] = saved.read(name, box)
    return state
