"""What `graft dpo`, `grpo`, `ppo` and `reward` have in common: settings, the policy and its frozen reference."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...base.model.transformer import Transformer
from ...base.parallel.mesh import Mesh
from ...base.run import Input, Run, TrainConfig
from ...base.settings import check_settings, split_settings
from ...base.training.optimizers import Optimizer, check_optimizer
from ..adapters.files import CONFIG, WEIGHTS, Adapter, check_fits, read_adapter
from ..adapters.lora import DEFAULT, LoraConfig, LowRank, lora_layers, wrapped
from ..adapters.selection import adapters_off, registry_of, use_adapters
from ..optimizers import OPTIMIZERS, PAGED_OPTIMIZERS, trained_optimizer
from ..sft import METHODS, QuantOptions, prepare_model, run_inputs

REFERENCE = "reference"  # the frozen copy of the adapter that training starts from


def parts(objective: type, data: type | None = None) -> dict[str, type]:
    """The parts of an alignment run's config; `objective` and `data` are the method's own dataclasses."""
    own = {"objective": objective} | ({"data": data} if data is not None else {})
    return own | {"train": TrainConfig, "lora": LoraConfig, "quant": QuantOptions}


def resolve(
    settings: Mapping[str, Any],
    kinds: Mapping[str, type],  # from `parts`
    *,
    method: str,
    defaults: Mapping[str, Any],  # the method's own, for keys of any part
    inputs: Mapping[str, Input],
) -> Run:
    """Settings and the method's own defaults -> one config. Raises ValueError for an unknown method or key."""
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; choose {', '.join(METHODS)}")
    given = check_settings(settings, *kinds.values())
    split = dict(zip(kinds, split_settings({**defaults, **given}, *kinds.values()), strict=True))
    if method == "full" and split["lora"]:
        key = next(iter(split["lora"]))
        raise ValueError(f"{key}={split['lora'][key]!r} is about an adapter; use method lora or qlora, or leave it out")
    loop = split["train"]
    loop.setdefault("micro_batch", loop["batch_size"])
    loop.setdefault("warmup_steps", min(20, loop["steps"] // 10))
    made = {name: kind(**split[name]) for name, kind in kinds.items() if not (name == "lora" and method == "full")}
    check_optimizer(made["train"].optimizer, OPTIMIZERS)
    for name in ("compile", "memory_budget", "recompute_layers"):
        if value := getattr(made["train"], name):
            raise ValueError(f"{name}={value} is of pretraining and SFT, not of alignment; leave it out")
    return Run(method=method, inputs=inputs, **made)


def all_inputs(base: Path, data: Path, eval_data: Path | None, adapter: Path | None) -> dict[str, Input]:
    """What the run reads, known by content."""
    inputs = run_inputs(base, data, eval_data)
    return inputs | ({"adapter": Input.of(adapter, [adapter / WEIGHTS, adapter / CONFIG])} if adapter else {})


def adapter_settings(adapter: Adapter, requested: Mapping[str, Any], method: str) -> dict[str, Any]:
    """The settings with rank, alpha and targets of the adapter that training goes on with.

    Raises ValueError where something else was requested, or where the adapter's layers differ in rank or alpha.
    """
    if method == "full":
        raise ValueError(f"--adapter {adapter.where} is about an adapter; use method lora or qlora, or merge it first")
    adapter.check_plain("the start of such a run")
    scales = {scale for _, _, scale in adapter.layers.values()}
    if len(adapter.ranks) > 1 or len(scales) > 1:
        raise ValueError(
            f"adapter {adapter.where} has ranks {adapter.ranks} and scales {sorted(scales)}; training goes on with one rank "
            "and one alpha for all layers: merge the adapter into its base first (graft adapter merge)"
        )
    rank, stabilized = adapter.ranks[0], bool(adapter.config.get("use_rslora"))
    alpha = scales.pop() * (rank**0.5 if stabilized else rank)
    own = {"rank": rank, "alpha": alpha, "targets": tuple(adapter.layers), "rank_stabilized": stabilized}
    for key, value in own.items():
        if key in requested and requested[key] != value:
            raise ValueError(
                f"{key}={requested[key]!r} was requested, adapter {adapter.where} has {value!r}; leave it out"
            )
    return dict(requested) | own


@dataclass(frozen=True, eq=False)
class Policy:
    """The model in training and the frozen one that it is compared with: the same base, another choice of adapter."""

    model: Transformer
    # The block in which `model` is the reference; None with full fine-tuning, where that holds before the first step only.
    reference: Callable[[], AbstractContextManager[object]] | None

    def before_training(self) -> AbstractContextManager[object]:
        """The reference, while no step was made yet."""
        return self.reference() if self.reference is not None else nullcontext()


def make_policy(config: Run, device: str, adapter: Path | None) -> Policy:
    """Load the base as the method wants it, with a new adapter or a copy of `adapter` to train.

    With `adapter` the model holds it twice: the one that trains, and a frozen one that the reference is. The result is
    again an adapter for the original base. Raises ValueError for an adapter of another base.
    """
    model = prepare_model(config, device)
    if config.method == "full":
        return Policy(model, None)
    if adapter is None:
        return Policy(model, lambda: adapters_off(model))
    found = read_adapter(adapter)
    check_fits(found, model, fingerprint=model.fingerprint)
    trained = {path: layer.updates[DEFAULT] for path, layer in lora_layers(model)}
    with torch.no_grad():
        for path, (a, b, scale) in found.layers.items():
            own = trained[path]
            own.lora_a.copy_(a)
            own.lora_b.copy_(b)
            frozen = LowRank(own.lora_a.detach().clone(), own.lora_b.detach().clone(), scale, trained=False)
            wrapped(model, path).add(REFERENCE, frozen)
    registry_of(model).default = DEFAULT
    return Policy(model, lambda: use_adapters(model, REFERENCE))


def policy_optimizer(model: torch.nn.Module, config: Run, mesh: Mesh | None = None) -> Optimizer:
    """The config's optimizer over what trains."""
    makers = PAGED_OPTIMIZERS if config.quant.paged else OPTIMIZERS
    return trained_optimizer(model, config.train, lora=config.lora, makers=makers, mesh=mesh)
