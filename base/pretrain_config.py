"""What pretraining alone has among a run's settings."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PretrainConfig:
    """Raises ValueError for values that can't work."""

    mup_base_width: int | None = None  # d_model for which the rates were chosen (muP); None: rates don't depend on it
    float8: bool = (
        False  # products of hidden layers in float8 on a GPU from Hopper on, bfloat16 elsewhere; dtype bfloat16
    )
    batch_warmup_steps: int = 0  # steps in which the batch grows to batch_size; 0: it is that from the first step on
    batch_warmup_start: int = 0  # sequences of the first step then; 0: an eighth of batch_size
    sample_every: int = 0  # steps between texts that the model writes (samples.jsonl); 0: none
    sample_prompts: tuple[str, ...] = ("",)  # what they continue; an empty one starts from bos or eos
    sample_tokens: int = 64  # of each
    benchmarks: tuple[str, ...] = ()  # NAME=FILE, scored at each evaluation as val_NAME_acc: blimp=blimp.zip
    benchmark_questions: int = 500  # of each at most, evenly spread over the file

    def __post_init__(self) -> None:
        for name in ("sample_tokens", "benchmark_questions"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be >= 1")
        for name in ("batch_warmup_steps", "batch_warmup_start", "sample_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be >= 0")
        if self.sample_every and not self.sample_prompts:
            raise ValueError(
                f"sample_every={self.sample_every} has no sample_prompts; leave them out for one text from bos or eos"
            )
        if self.batch_warmup_start and not self.batch_warmup_steps:
            raise ValueError(f"batch_warmup_start={self.batch_warmup_start} needs batch_warmup_steps")
        if self.mup_base_width is not None and self.mup_base_width < 1:
            raise ValueError(f"mup_base_width={self.mup_base_width} must be >= 1")
