"""Laws: a setting that would do nothing is refused by its name; one that works, or is the default, passes."""

from dataclasses import fields
from typing import Any

import pytest

from graft.base.idle import RULES, refuse_idle
from graft.base.model.config import ModelConfig
from graft.base.pretrain import resolve
from graft.base.pretrain_config import PretrainConfig
from graft.base.run import Run, TrainConfig

EXPERTS = {"n_experts": 4}
IDLE: list[tuple[dict[str, Any], dict[str, Any], str]] = [  # (does nothing, with it it works, how to turn it on)
    ({"muon_normalize_rows": True}, {"optimizer": "muon"}, "muon_normalize_rows=true is of Muon; set optimizer=muon"),
    ({"muon_momentum": 0.5}, {"optimizer": "muon"}, "muon_momentum=0.5 is of Muon"),
    ({"soap_every": 5}, {"optimizer": "soap"}, "soap_every=5 is of SOAP"),
    ({"ema_result": False}, {"ema_decay": 0.9}, "ema_result=false is of the weights' average; set ema_decay"),
    ({"decay_fraction": 0.5}, {"schedule": "wsd"}, "decay_fraction=0.5 is of the schedule wsd"),
    ({"schedule": "constant", "final_lr_fraction": 0.5}, {"schedule": "linear"}, "final_lr_fraction=0.5 is of"),
    ({"patience": 2, "eval_every": 0}, {"eval_every": 1}, "patience=2 counts evaluations"),
    ({"head_rate": 2.0}, {"tie_embeddings": False}, "head_rate=2.0 is of an untied head"),
    ({"router_bias": True}, {**EXPERTS, "bias_rate": 0.01}, "router_bias=true is of mixtures of experts"),
    ({**EXPERTS, "router_bias": True}, {"bias_rate": 0.01}, "router_bias=true is of a router whose bias moves"),
    ({"d_shared_expert": 8}, EXPERTS, "d_shared_expert=8 is of mixtures"),
    ({**EXPERTS, "gate_shared_expert": False}, {"d_shared_expert": 8}, "gate_shared_expert=false is of a shared expert"),
    ({**EXPERTS, "expert_layers": (False,) * 6}, {"expert_layers": (True, False) * 3}, "expert_layers names none"),
    ({**EXPERTS, "mlp_bias": True}, {"expert_layers": (True, False) * 3}, "mlp_bias=true is of feed-forward layers"),
    ({"d_linear_k": 8}, {"linear_layers": (True, False)}, "d_linear_k=8 is of Gated DeltaNet; set linear_layers"),
    ({"predict_loss": 0.5}, {"n_predict": 1}, "predict_loss=0.5 is of multi-token prediction"),
    ({"rope_interleaved": False}, {"d_latent": 16, "d_rope": 8}, "rope_interleaved=false is of latent attention"),
    ({"positions": "learned", "rope_theta": 5.0}, {"positions": "rope"}, "rope_theta=5.0 is of RoPE"),
    ({"positions": "learned", "rope_layers": (True, False)}, {"positions": "rope"}, "rope_layers=True,False is of RoPE"),
    ({"sample_prompts": ("a", "b")}, {"sample_every": 5}, "sample_prompts=a,b is of samples; set sample_every"),
    ({"benchmark_questions": 5}, {"benchmarks": ("blimp=x",)}, "benchmark_questions=5 is of benchmarks"),
    ({"checkpointing": True, "memory_budget": "1GiB"}, {"checkpointing": False}, "memory_budget=1GiB itself chooses"),
    ({"checkpointing": True, "recompute_layers": 7}, {"recompute_layers": 6}, "recompute_layers=7 is more than n_layers=6"),
]  # fmt: skip


@pytest.mark.parametrize(("idle", "on", "message"), IDLE, ids=[message.split(" ")[0] for *_, message in IDLE])
def test_what_does_nothing_is_refused(idle: dict[str, Any], on: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        refuse_idle(idle, resolve(idle, preset_name=None, vocab_size=64))
    works = idle | on
    refuse_idle(works, resolve(works, preset_name=None, vocab_size=64))


def test_defaults_pass_and_presets_are_not_asked_for() -> None:
    """Laws: all defaults written out are no mistake, nor what a preset sets; every rule's keys are fields of its part."""
    run = Run(TrainConfig(), ModelConfig(64), pretrain=PretrainConfig())
    parts = {"train": TrainConfig, "model": ModelConfig, "pretrain": PretrainConfig}
    known = {name: {field.name: field.default for field in fields(part)} for name, part in parts.items()}
    refuse_idle({key: value for part in known.values() for key, value in part.items()}, run)
    for name in ("gpt2", "transformer-2017"):
        refuse_idle({}, resolve({}, preset_name=name, vocab_size=64))
    assert all(key in known[rule.part] for rule in RULES for key in rule.keys)
