"""Alignment's stages by name, for commands that must run a step of one without knowing what it computes."""

from .memory.settings import MemorySettings
from .memory.step import Work


def step_work(settings: MemorySettings) -> Work | None:
    """What a step of settings.stage computes, with the stage's defaults; None for the next token's loss. Raises ValueError for
    settings that the stage can't have."""
    if settings.stage == "sft":
        return None
    from importlib import import_module

    from .align import setup

    stage = import_module(f".align.run_{settings.stage}", __package__).STAGE
    defaults = stage.defaults(settings.method, {}, 1)
    return stage.work(setup.resolve({}, stage.parts, method=settings.method, defaults=defaults, inputs={}))
