"""The optimizers that fine-tuning may use: base's, and quant's 8-bit AdamW, which base doesn't know."""

from collections.abc import Mapping, Sequence
from functools import partial

from torch import Tensor, nn

from ..base.model.init import parameter_roles
from ..base.parallel.mesh import Mesh, MeshShape, is_copied, make_mesh, parse_mesh, stage
from ..base.parallel.optimizer import ShardedOptimizer
from ..base.parallel.ranks import Ranks
from ..base.parallel.sharding import shard
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
    mesh: Mesh | None = None,  # whose ranks share the optimizer's state, at ZeRO stage 1
) -> Optimizer:
    """The config's optimizer over what trains in a model; with LoRA+ two of them as one."""
    roles = parameter_roles(model)

    def make(named: Sequence[tuple[str, Tensor]]) -> Optimizer:
        if lora is None or lora.lora_plus_ratio == 1:
            return make_optimizer(named, config, makers, roles=roles)
        return TwoRates(
            named,
            lambda part: make_optimizer(part, config, makers, roles=roles),
            ratio=lora.lora_plus_ratio,
            learning_rate=config.learning_rate,
        )

    if mesh is None or is_copied(mesh.shape, config):
        return make([(name, p) for name, p in model.named_parameters() if p.requires_grad])
    return ShardedOptimizer(shard(model, config, mesh), make)


def finetuning_mesh(config: TrainConfig, ranks: Ranks, device: str, *, lora: LoraConfig | None) -> Mesh:
    """The mesh of a fine-tuning run: data parallel, every rank with the whole model, the optimizer's state divided or not.

    Raises ValueError for another mesh, and for an optimizer whose state can't be divided by rows.
    """
    check_finetuning_mesh(parse_mesh(config.mesh, ranks.n), config, lora)
    return make_mesh(config, None, ranks, device)


def check_finetuning_mesh(shape: MeshShape, config: TrainConfig, lora: LoraConfig | None) -> None:
    """Raise ValueError for what `finetuning_mesh` doesn't cover."""
    if shape.n > shape.dp or stage(shape, config) > 1:
        raise ValueError(
            f"mesh={shape}, zero={config.zero}: fine-tuning keeps the whole model on every rank; set mesh=dp with zero 0 or 1"
        )
    has_two_rates = lora is not None and lora.lora_plus_ratio != 1
    if stage(shape, config) and (config.optimizer != "adamw" or has_two_rates or config.ema_decay):
        raise ValueError(
            f"zero={config.zero} divides plain AdamW's state alone here; use optimizer=adamw without lora_plus_ratio and "
            "ema_decay, or zero=0"
        )
