"""The checkpoints of a run: weights, optimizer, random state and step in one folder, whole or absent."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from ..checkpoint import folder_beside, load_tensors, random_state, save_tensors, set_random_state, write_json
from ..json_fields import read_json
from ..parallel.checkpoint import read_state, read_weights, write_index, write_pieces, write_together
from ..parallel.optimizer import ShardedOptimizer
from ..precision import LossScaler
from ..run import TrainConfig
from .optimizers import Optimizer

STATE = {"step": int, "loss_scale": float, "n_good_steps": int, "extra": dict}


class ExtraState(Protocol):
    """State beside weights and optimizer that a resumed run needs: rollout buffers, running means."""

    def state(self) -> dict[str, Any]:
        """Tensors and JSON values by name."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Put back what `state` gave."""
        ...


def save_checkpoint(
    folder: Path,
    step: int,
    optimizer: Optimizer,
    scaler: LossScaler,
    extra: ExtraState | None = None,
    export: Callable[[Path], None] | None = None,  # writes more files beside these
) -> Path:
    """Write folder/step-N: trained weights, optimizer, random state, step, extra state; whole or not at all. Returns it.

    A ShardedOptimizer's ranks all call it, and each writes its own part; `extra` and `export` are rank 0's.
    """
    target = checkpoint_of(folder, step)
    if target.exists():
        return target

    def write_rest(temporary: Path) -> None:
        more = extra.state() if extra is not None else {}
        save_tensors(temporary / "random.safetensors", random_state())
        if tensors := {name: value for name, value in more.items() if isinstance(value, Tensor)}:
            save_tensors(temporary / "extra.safetensors", tensors)
        state = {"step": step, "loss_scale": scaler.scale, "n_good_steps": scaler.n_good}
        rest = {name: value for name, value in more.items() if name not in tensors}
        write_json(temporary / "state.json", state | {"extra": rest})
        if export is not None:
            export(temporary)

    if isinstance(optimizer, ShardedOptimizer):
        together = optimizer.sharding.mesh.ranks

        def finish(temporary: Path) -> None:
            write_rest(temporary)
            write_index(temporary, together.n)

        write_together(target, together, lambda temporary: write_pieces(temporary, optimizer), finish)
        return target
    with folder_beside(target) as temporary:
        save_tensors(temporary / "weights.safetensors", dict(optimizer.named))
        save_tensors(temporary / "optimizer.safetensors", optimizer.state_tensors())
        write_rest(temporary)
    return target


def load_checkpoint(folder: Path, optimizer: Optimizer, scaler: LossScaler, extra: ExtraState | None = None) -> int:
    """Put the newest checkpoint of `folder` back in place; returns its step, 0 when there is none."""
    found = checkpoints_in(folder)
    if not found:
        return 0
    newest = found[-1]
    state = read_json(newest / "state.json", STATE)
    load_weights(newest, optimizer)
    load_optimizer(newest, optimizer)
    set_random_state(load_tensors(newest / "random.safetensors"))
    scaler.scale, scaler.n_good = state["loss_scale"], state["n_good_steps"]
    if extra is not None:
        tensors = newest / "extra.safetensors"
        extra.restore(state["extra"] | (load_tensors(tensors) if tensors.exists() else {}))
    return state["step"]


def load_optimizer(checkpoint: Path, optimizer: Optimizer) -> None:
    """Put a checkpoint's optimizer state back. Raises ValueError where it doesn't fit."""
    optimizer.load_state_tensors(read_state(checkpoint, optimizer))


def load_weights(checkpoint: Path, optimizer: Optimizer) -> None:
    """Copy a checkpoint's weights into the parameters that the optimizer trains."""
    read_weights(checkpoint, optimizer)


def remove_checkpoints(folder: Path, config: TrainConfig, best: int | None) -> None:
    """Remove the checkpoints that config.keep doesn't name. The newest always stays: resuming needs it."""
    for checkpoint in checkpoints_in(folder)[: -config.kept_last]:
        step = int(checkpoint.name.removeprefix("step-"))
        if not (config.kept_every and step % config.kept_every == 0) and not (config.keeps_best and step == best):
            remove_checkpoint(checkpoint)


def checkpoint_of(folder: Path, step: int) -> Path:
    """Where the checkpoint after `step` updates lies."""
    return folder / f"step-{step:08d}"


def checkpoints_in(folder: Path) -> list[Path]:
    """Whole checkpoints, the oldest first; other folders are somebody else's."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir() and path.name[5:].isdecimal())


def remove_checkpoint(folder: Path) -> None:
    """Delete a checkpoint so that a kill in between can't leave a broken one under its name."""
    aside = folder.with_name(f".{folder.name}.tmp")
    folder.rename(aside)
    shutil.rmtree(aside)
