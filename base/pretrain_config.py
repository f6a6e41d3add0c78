"""What pretraining alone has among a run's settings."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PretrainConfig:
    """Raises ValueError for values that can't work."""

    mup_base_width: int | None = None  # d_model for which the rates were chosen (muP); None: rates don't depend on it

    def __post_init__(self) -> None:
        if self.mup_base_width is not None and self.mup_base_width < 1:
            raise ValueError(f"mup_base_width={self.mup_base_width} must be >= 1")
