"""The checkpoints of a run: weights, optimizer, random state and step in one folder, whole or absent."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..checkpoint import folder_beside, load_tensors, random_state, save_tensors, set_random_state, write_json
from ..json_fields import read_json
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
    """Write folder/step-N: trained weights, optimizer, random state, step, extra state; whole or not at all. Returns it."""
    target = folder / f"step-{step:08d}"
    if target.exists():
        return target
    more = extra.state() if extra is not None else {}
    with folder_beside(target) as temporary:
        save_tensors(temporary / "weights.safetensors", dict(optimizer.named))
        save_tensors(temporary / "optimizer.safetensors", optimizer.state_tensors())
        save_tensors(temporary / "random.safetensors", random_state())
        if tensors := {name: value for name, value in more.items() if isinstance(value, Tensor)}:
            save_tensors(temporary / "extra.safetensors", tensors)
        state = {"step": step, "loss_scale": scaler.scale, "n_good_steps": scaler.n_good}
        rest = {name: value for name, value in more.items() if name not in tensors}
        write_json(temporary / "state.json", state | {"extra": rest})
        if export is not None:
            export(temporary)
    return target


def load_checkpoint(folder: Path, optimizer: Optimizer, scaler: LossScaler, extra: ExtraState | None = None) -> int:
    """Put the newest checkpoint of `folder` back in place; returns its step, 0 when there is none."""
    found = checkpoints_in(folder)
    if not found:
        return 0
    newest = found[-1]
    state = read_json(newest / "state.json", STATE)
    load_weights(newest, optimizer)
    optimizer.load_state_tensors(load_tensors(newest / "optimizer.safetensors"))
    set_random_state(load_tensors(newest / "random.safetensors"))
    scaler.scale, scaler.n_good = state["loss_scale"], state["n_good_steps"]
    if extra is not None:
        tensors = newest / "extra.safetensors"
        extra.restore(state["extra"] | (load_tensors(tensors) if tensors.exists() else {}))
    return state["step"]


def load_weights(checkpoint: Path, optimizer: Optimizer) -> None:
    """Copy a checkpoint's weights into the parameters that the optimizer trains."""
    weights = load_tensors(checkpoint / "weights.safetensors")
    with torch.no_grad():
        for name, parameter in optimizer.named:
            if name not in weights or weights[name].shape != parameter.shape:
                raise ValueError(
                    f"{checkpoint} does not fit this model: weight {name}; resume with the run's own config"
                )
            parameter.copy_(weights[name])


def remove_checkpoints(folder: Path, config: TrainConfig, best: int | None) -> None:
    """Remove the checkpoints that config.keep doesn't name. The newest always stays: resuming needs it."""
    *older, _ = checkpoints_in(folder)
    for checkpoint in older:
        step = int(checkpoint.name.removeprefix("step-"))
        if not (config.kept_every and step % config.kept_every == 0) and not (config.keeps_best and step == best):
            remove_checkpoint(checkpoint)


def checkpoints_in(folder: Path) -> list[Path]:
    """Whole checkpoints, the oldest first; other folders are somebody else's."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir() and path.name[5:].isdecimal())


def remove_checkpoint(folder: Path) -> None:
    """Delete a checkpoint so that a kill in between can't leave a broken one under its name."""
    aside = folder.with_name(f".{folder.name}.tmp")
    folder.rename(aside)
    shutil.rmtree(aside)
