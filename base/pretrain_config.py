"""What pretraining alone has among a run's settings."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PretrainConfig:
    """Raises ValueError for values that can't work."""

    mup_base_width: int | None = None  # d_model for which the rates were chosen (muP); None: rates don't depend on it
    batch_warmup_steps: int = 0  # steps in which the batch grows to batch_size; 0: it is that from the first step on
    batch_warmup_start: int = 0  # sequences of the first step then; 0: an eighth of batch_size

    def __post_init__(self) -> None:
        for name in ("batch_warmup_steps", "batch_warmup_start"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be >= 0")
        if self.batch_warmup_start and not self.batch_warmup_steps:
            raise ValueError(f"batch_warmup_start={self.batch_warmup_start} needs batch_warmup_steps")
        if self.mup_base_width is not None and self.mup_base_width < 1:
            raise ValueError(f"mup_base_width={self.mup_base_width} must be >= 1")
