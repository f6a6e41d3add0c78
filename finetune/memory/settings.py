"""What decides a step's memory: the model's sizes, the method and the batch."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ...base.hub import model_folder
from ...base.model.config import ModelConfig
from ...base.model.presets import PRESETS, preset
from ..adapters.config import LoraConfig

Method = Literal["full", "lora", "qlora", "generate"]
METHODS = ("full", "lora", "qlora", "generate")
STAGES = ("sft", "dpo", "reward", "grpo", "ppo")  # what a training step computes; pretraining's is sft's
SMALL_VOCAB = 8192  # of the small presets, which take their tokenizer's in a real run


@dataclass(frozen=True)
class MemorySettings:
    """One training step, or one prompt and its answer. Raises ValueError for names that don't exist and sizes below 1.

    In dpo and reward a row of the batch is a pair, two answers of seq_len tokens each with their prompt; in grpo and ppo it is
    an answer with its prompt.
    """

    method: str = "full"  # full: float32 weights; lora: frozen weights in dtype; qlora: in NF4; generate: in dtype
    batch_size: int = 1  # sequences an update
    micro_batch: int | None = None  # sequences at once; None: the whole batch
    seq_len: int = 512  # tokens a sequence; for generate the prompt and the answer together
    dtype: str = "bfloat16"  # of the arithmetic, and of frozen weights
    optimizer: str = "adamw"
    checkpointing: bool = True  # recompute each layer in the backward pass
    rank: int = 16  # of the adapters
    targets: tuple[str, ...] = ("all-linear",)  # which linears have one
    double_quant: bool = True
    lora: LoraConfig | None = None  # the adapter in full, in place of rank and targets
    stage: str = "sft"  # sft, dpo, reward, grpo or ppo
    recompute_layers: int | None = None  # how many layers checkpointing recomputes, the first ones; None: all
    averages: bool = False  # an exponential average of the weights is kept (ema_decay)

    def __post_init__(self) -> None:
        from ...base.dtypes import DTYPES  # not above: `graft plan` reads this file and needs no torch
        from ..optimizers import OPTIMIZERS

        if self.method not in METHODS:
            raise ValueError(f"unknown method {self.method!r}; choose {', '.join(METHODS)}")
        if self.stage not in STAGES:
            raise ValueError(f"unknown stage {self.stage!r}; choose {', '.join(STAGES)}")
        if self.stage != "sft" and self.method == "generate":
            raise ValueError(
                f"method generate trains nothing, so stage {self.stage} has none; choose full, lora or qlora"
            )
        if self.dtype not in DTYPES:
            raise ValueError(f"unknown dtype {self.dtype!r}; choose {', '.join(DTYPES)}")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"unknown optimizer {self.optimizer!r}; choose {', '.join(OPTIMIZERS)}")
        for name in ("batch_size", "micro_batch", "seq_len", "rank"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be >= 1")
        if self.method == "generate" and self.seq_len < 2:
            raise ValueError(f"seq_len={self.seq_len} leaves no room for a prompt and a new token; use at least 2")

    @property
    def adapter(self) -> LoraConfig:
        """The adapter of lora and qlora."""
        return self.lora or LoraConfig(rank=self.rank, targets=self.targets)

    @property
    def name(self) -> str:
        """Of a column or a bar: the method, behind the stage where that is alignment."""
        return self.method if self.stage == "sft" else f"{self.stage} {self.method}"

    @property
    def rows(self) -> int:
        """Sequences at once on the device."""
        return min(self.batch_size, self.micro_batch or self.batch_size)


def read_model_config(source: ModelConfig | Path | str) -> ModelConfig:
    """A ModelConfig, a preset's name, a model folder or a config.json -> ModelConfig. Small presets get 8,192 words.

    Raises ValueError that lists the presets for a name that is neither, or for an architecture that isn't covered.
    """
    if isinstance(source, ModelConfig):
        return source
    if str(source) in PRESETS:
        found = preset(str(source))
        return replace(found, vocab_size=SMALL_VOCAB) if found.vocab_size == 1 else found
    path = model_folder(source, weights=False)
    if not path.exists():
        raise ValueError(
            f"{str(source)!r} is no model folder, no config.json and no preset; presets are {', '.join(PRESETS)}"
        )
    from ...base.json_fields import read_json
    from ...base.model.config_json import config_from_dict
    from ...base.model.huggingface import load_config

    if path.is_file():
        return config_from_dict(read_json(path), where=str(path))
    return load_config(path)
