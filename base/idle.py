"""Settings that were asked for and would do nothing, because what they belong to is off: refused by name."""

from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

from .model.config import ModelConfig
from .run import Run, TrainConfig
from .settings import plain


@dataclass(frozen=True)
class _Rule:
    keys: tuple[str, ...]
    part: str  # of Run that has them
    works: Callable[[Any], bool]  # the part -> whether the keys do anything
    belongs: str  # to what; then how to turn it on


def _mixes(c: ModelConfig) -> bool:
    return any(c.layer(i).feed_forward == "experts" for i in range(c.n_layers))


RULES = (
    _Rule(
        ("muon_momentum", "muon_polynomial", "muon_iterations", "muon_normalize_rows"), "train",
        lambda c: c.optimizer == "muon", "Muon; set optimizer=muon",
    ),
    _Rule(("soap_every", "soap_largest"), "train", lambda c: c.optimizer == "soap", "SOAP; set optimizer=soap"),
    _Rule(("ema_result",), "train", lambda c: c.ema_decay > 0, "the weights' average; set ema_decay"),
    _Rule(("decay_fraction",), "train", lambda c: c.schedule == "wsd", "the schedule wsd; set schedule=wsd"),
    _Rule(
        ("final_lr_fraction",), "train", lambda c: c.schedule != "constant", "schedules that fall; set another schedule"
    ),
    _Rule(
        ("n_experts_per_token", "d_expert", "d_shared_expert", "gate_shared_expert", "router", "router_bias", "bias_rate",
         "n_expert_groups", "n_groups_per_token", "routed_scale", "normalize_experts", "balance_loss", "router_z_loss"),
        "model", lambda c: c.n_experts > 0, "mixtures of experts; set n_experts",
    ),
    _Rule(("n_experts",), "model", _mixes, "layers with experts, and expert_layers names none; name one"),
    _Rule(("gate_shared_expert",), "model", lambda c: c.d_shared_expert > 0, "a shared expert; set d_shared_expert"),
    _Rule(
        ("router_bias",), "model", lambda c: not c.router_bias or c.bias_rate > 0,
        "a router whose bias moves; set bias_rate, such as 0.001",
    ),
    _Rule(
        ("mlp_bias",), "model",
        lambda c: c.d_shared_expert > 0 or any(c.layer(i).feed_forward != "experts" for i in range(c.n_layers)),
        "feed-forward layers that are no experts, of which there are none; name some by expert_layers",
    ),
    _Rule(
        ("n_linear_k_heads", "n_linear_v_heads", "d_linear_k", "d_linear_v", "linear_conv"), "model",
        lambda c: c.n_linear_layers > 0, "Gated DeltaNet; set linear_layers",
    ),
    _Rule(("predict_loss",), "model", lambda c: c.n_predict > 0, "multi-token prediction; set n_predict"),
    _Rule(("rope_interleaved",), "model", lambda c: c.d_latent is not None, "latent attention; set d_latent"),
    _Rule(
        ("rope_theta", "rope_scaling", "rope_layers", "rope_fraction"), "model", lambda c: c.positions == "rope",
        "RoPE; set positions=rope",
    ),
    _Rule(("sample_prompts", "sample_tokens"), "pretrain", lambda c: c.sample_every > 0, "samples; set sample_every"),
    _Rule(("benchmark_questions",), "pretrain", lambda c: bool(c.benchmarks), "benchmarks; set them"),
)  # fmt: skip


def refuse_idle(given: Mapping[str, Any], config: Run) -> None:
    """Raise ValueError for a setting of `given` that isn't its default and does nothing in `config`, which it went into.

    `given` is what was asked for, by flags, --set, a TOML file or in Python; not what a preset or a depth sets.
    """
    for rule in RULES:
        part = getattr(config, rule.part)
        if part is None:
            continue
        defaults = {field.name: field.default for field in fields(part) if field.default is not MISSING}
        for key in rule.keys:
            if key in given and given[key] != defaults[key] and not rule.works(part):
                raise ValueError(f"{key}={_written(given[key])} is of {rule.belongs}, or leave it out")
    _refuse_pairs(given, config.train)
    if config.model is not None:
        _refuse_beyond_model(given, config.train, config.model)


def _refuse_pairs(given: Mapping[str, Any], train: TrainConfig) -> None:
    if train.memory_budget and given.get("checkpointing"):
        raise ValueError(
            f"memory_budget={train.memory_budget} itself chooses how many layers are recomputed; leave checkpointing and "
            "recompute_layers out"
        )
    if given.get("patience") and not train.eval_every:
        raise ValueError(f"patience={train.patience} counts evaluations, and eval_every=0 has one, at the end; set it")


def _refuse_beyond_model(given: Mapping[str, Any], train: TrainConfig, model: ModelConfig) -> None:
    n = train.recompute_layers
    if n is not None and n > model.n_layers:
        raise ValueError(f"recompute_layers={n} is more than n_layers={model.n_layers}; leave it out to recompute all")
    if given.get("head_rate", 1.0) != 1.0 and model.tie_embeddings:
        raise ValueError(
            f"head_rate={train.head_rate} is of an untied head; set tie_embeddings=false, or embedding_rate instead"
        )


def _written(value: Any) -> str:
    """A value as --set takes it."""
    if isinstance(value, bool):
        return str(value).lower()
    value = plain(value)
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
