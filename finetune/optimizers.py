"""The optimizers that fine-tuning may use: base's, and quant's 8-bit AdamW, which base doesn't know."""

from functools import partial

from ..base.train import OPTIMIZERS as BASE_OPTIMIZERS
from ..base.train import OptimizerMaker
from ..quant.adamw8bit import AdamW8bit

OPTIMIZERS: dict[str, OptimizerMaker] = {**BASE_OPTIMIZERS, "adamw8bit": AdamW8bit}
PAGED_OPTIMIZERS: dict[str, OptimizerMaker] = {"adamw8bit": partial(AdamW8bit, paged=True)}  # moments in host memory
