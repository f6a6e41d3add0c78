"""The optimizers that fine-tuning may use: base's, and quant's 8-bit AdamW, which base doesn't know."""

from collections.abc import Mapping
from functools import partial

from torch import nn

from ..base.model.init import parameter_roles
from ..base.run import TrainConfig
from ..base.training.optimizers import OPTIMIZERS as BASE_OPTIMIZERS
from ..base.training.optimizers import Optimizer, OptimizerMaker, make_optimizer
from ..quant.adamw8bit import AdamW8bit
from .adapters.config import LoraConfig
from .adapters.lora_plus import TwoRates

OPTIMIZERS: dict[str, OptimizerMaker] = {**BASE_OPTIMIZERS, "adamw8bit": AdamW8bit}
PAGED_OPTIMIZERS: dict[str, OptimizerMaker] = {"adamw8bit": partial(AdamW8bit, paged=True)}  # moments in host memory


def trained_optimizer(
    model: nn.Module,
    config: TrainConfig,
    *,
    lora: LoraConfig | None = None,  # whose lora_plus_ratio is taken
    makers: Mapping[str, OptimizerMaker] = OPTIMIZERS,
) -> Optimizer:
    """The config's optimizer over what trains in a model; with LoRA+ two of them as one."""
    roles = parameter_roles(model)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if lora is None or lora.lora_plus_ratio == 1:
        return make_optimizer(trained, config, makers, roles=roles)
    return TwoRates(
        trained,
        lambda named: make_optimizer(named, config, makers, roles=roles),
        ratio=lora.lora_plus_ratio,
        learning_rate=config.learning_rate,
    )
