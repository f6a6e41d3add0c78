"""`--log tensorboard|wandb`: callbacks that send a run's figures to another program, each an extra to install.

metrics.jsonl is written in any case. A logger starts at the run's first step, or again at its resumption.
"""

import os
import secrets
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from .callbacks import Callback
from .checkpoint import write_file
from .extras import needs


class TensorBoard(Callback):
    """Writes event files to RUN/tensorboard; `tensorboard --logdir RUN` shows them."""

    def __init__(self) -> None:
        with needs("tensorboard", "--log tensorboard"):
            import tensorboard  # noqa: F401  # pyright: ignore[reportUnusedImport]
        self._writer: Any = None

    def on_start(self, folder: Path, config: Mapping[str, Any], step: int) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        # purge_step: TensorBoard drops what a killed process had written after the checkpoint, or all of a run started over.
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else 0)
        self._writer.add_text("config", "\n".join(f"    {key} = {value}" for key, value in config.items()), step)

    def on_step(self, line: Mapping[str, Any]) -> None:
        for name, value in numbers(line).items():
            self._writer.add_scalar(name, value, line["step"])

    def on_close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class WeightsAndBiases(Callback):
    """Sends figures to wandb, under the name of the run's folder; a resumed run goes on as the run it was.

    Project, entity, offline mode: wandb's own environment variables, such as WANDB_PROJECT and WANDB_MODE.
    """

    def __init__(self) -> None:
        with needs("wandb", "--log wandb"):
            self._wandb: Any = import_module("wandb")
        self._is_running, self._has_ended = False, False

    def on_start(self, folder: Path, config: Mapping[str, Any], step: int) -> None:
        self._wandb.init(
            project=os.environ.get("WANDB_PROJECT", "graft"),
            name=folder.resolve().name,
            id=_identity(folder, is_new=step == 0),
            resume="allow",
            dir=str(folder),
            config=dict(config),
        )
        self._is_running, self._has_ended = True, False

    def on_step(self, line: Mapping[str, Any]) -> None:
        self._wandb.log(numbers(line), step=line["step"])

    def on_end(self, summary: Mapping[str, Any]) -> None:
        self._wandb.log({f"summary/{name}": value for name, value in numbers(summary).items()})
        self._has_ended = True

    def on_close(self) -> None:
        if self._is_running:
            self._is_running = False
            self._wandb.finish(exit_code=0 if self._has_ended else 1)  # 1: wandb shows the run as failed


def _identity(folder: Path, *, is_new: bool) -> str:
    """What wandb knows the run by, kept in its folder: a resumed run goes on with it, one that starts over has another."""
    file = folder / "wandb-id.txt"
    if is_new or not file.exists():
        write_file(file, secrets.token_hex(4).encode())
    return file.read_text(encoding="utf-8").strip()


def numbers(line: Mapping[str, Any]) -> dict[str, float]:
    """A line's figures that can be drawn."""
    return {
        name: value
        for name, value in line.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and name != "step"
    }


LOGGERS: dict[str, type[Callback]] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


def loggers(names: Sequence[str]) -> list[Callback]:
    """The loggers of `--log`, each name or several joined by commas. Raises ValueError for an unknown or missing one."""
    chosen = [word.strip() for name in names for word in name.split(",") if word.strip()]
    if unknown := [name for name in chosen if name not in LOGGERS]:
        raise ValueError(
            f"--log {unknown[0]!r} is unknown; choose {', '.join(LOGGERS)} (metrics.jsonl is always written)"
        )
    return [LOGGERS[name]() for name in dict.fromkeys(chosen)]
