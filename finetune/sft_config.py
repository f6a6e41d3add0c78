"""What `graft sft` can be told: the keys of its config, its own defaults, and which belong together."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..base.run import Run, TrainConfig
from ..base.settings import check_settings, split_settings
from ..base.training.optimizers import check_optimizer
from .adapters.lora import LoraConfig
from .data.dataset import DatasetOptions
from .data.packing import steps_for_epochs
from .optimizers import OPTIMIZERS

Method = Literal["full", "lora", "qlora"]
METHODS = ("full", "lora", "qlora")
# Peak rates where training starts well; a low-rank update wants about ten times the full one's ("LoRA Without Regret").
LEARNING_RATES = {"full": 5e-5, "lora": 5e-4, "qlora": 5e-4}
# Fine-tuning's own defaults for keys of the loop; those that depend on the method or the data are in `resolve`.
DEFAULTS: dict[str, Any] = {"batch_size": 16, "weight_decay": 0.0}


@dataclass(frozen=True)
class DataOptions:
    """How records become batches."""

    epochs: float = 3.0  # passes over the records, when `steps` is not given
    max_seq_len: int | None = None  # tokens a record may have, see on_too_long for longer ones; none: the model's
    streaming: bool = False  # encode records one by one to a file in --out: for data that exceed the memory
    packing: bool = False  # records end to end in one row, each seeing only itself, instead of one a row, padded
    fields: dict | None = None  # other field names of the rows, such as {prompt = "question"}
    chat_template: str | None = None  # name or file of a template; none: the base's own
    template_args: dict | None = None  # what the template gets beside the messages, such as {enable_thinking = false}

    def __post_init__(self) -> None:
        if not (self.epochs > 0 and math.isfinite(self.epochs)):
            raise ValueError(f"epochs={self.epochs} must be > 0 and finite")


@dataclass(frozen=True)
class QuantOptions:
    """What is held in few bits, and how."""

    double_quant: bool = True  # QLoRA: quantize the quantization constants too
    calibrate: str | None = None  # QLoRA: text file by which the 4-bit codes are chosen; none: the nearest codes
    quant_backend: str = "graft"  # QLoRA: or bitsandbytes, whose layers give the same results, to compare
    paged: bool = False  # optimizer=adamw8bit: keep its moments in the host's memory, a GPU reads them in each step


PARTS = {  # whose keys `graft sft` takes
    "data": DataOptions,
    "records": DatasetOptions,
    "train": TrainConfig,
    "lora": LoraConfig,
    "quant": QuantOptions,
}


def resolve(settings: Mapping[str, Any], *, method: str, n_rows: int) -> Run:
    """Settings (from TOML, --set, flags) -> one config. Raises ValueError for an unknown method or key."""
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; choose {', '.join(METHODS)}")
    checked = check_settings(settings, *PARTS.values())
    data, records, loop, lora, quant = split_settings(checked, *PARTS.values())
    if method == "full" and lora:
        key = next(iter(lora))
        raise ValueError(f"{key}={lora[key]!r} is about an adapter; use method lora or qlora, or leave it out")
    options = DataOptions(**data)
    loop: dict[str, Any] = DEFAULTS | {"learning_rate": LEARNING_RATES[method]} | loop
    loop.setdefault("micro_batch", loop["batch_size"])
    loop.setdefault("steps", steps_for_epochs(n_rows, loop["batch_size"], options.epochs))
    loop.setdefault("warmup_steps", min(20, loop["steps"] // 10))
    train = TrainConfig(**loop)
    check_optimizer(train.optimizer, OPTIMIZERS)
    return Run(
        train=train,
        method=method,
        data=options,
        records=DatasetOptions(**records),
        lora=None if method == "full" else LoraConfig(**lora),
        quant=QuantOptions(**quant),
    )


def default_texts() -> dict[str, object]:
    """Defaults of fine-tuning's own, for `graft config`; the other keys have their dataclass's."""
    rates = ", ".join(f"{method} {rate:g}" for method, rate in LEARNING_RATES.items())
    return {
        **DEFAULTS,
        "learning_rate": rates,
        "micro_batch": "batch_size",
        "steps": "epochs * rows / batch_size",
        "warmup_steps": "steps / 10, at most 20",
    }


def refuse_unused(requested: Mapping[str, Any], *, method: str, has_evaluation: bool) -> None:
    """Raise ValueError for a setting that was asked for and would do nothing."""
    if requested.get("eval_every") and not has_evaluation:
        raise ValueError(
            f"eval_every={requested['eval_every']} has nothing to evaluate; give --eval-data, or leave it out"
        )
    if "double_quant" in requested and method != "qlora":
        value = str(requested["double_quant"]).lower()
        raise ValueError(
            f"double_quant={value} is about a base in 4 bits, and the method is {method}; use qlora, or leave it out"
        )
