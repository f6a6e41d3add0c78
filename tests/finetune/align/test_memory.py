"""Law: an alignment step's predicted bytes are those that the allocator measures, and DPO's are the same SFT's."""

from dataclasses import replace
from typing import Any

import pytest

from graft.base.model.config import ModelConfig
from graft.finetune.memory.fit import find_fits
from graft.finetune.memory.measure import measure
from graft.finetune.memory.predict import estimate
from graft.finetune.memory.settings import MemorySettings
from graft.finetune.stages import step_work

SMALL = ModelConfig(1000, d_model=64, n_layers=5, n_heads=4, n_kv_heads=2, d_head=16, d_ff=160, max_seq_len=128)


def settings_of(stage: str, method: str = "lora", **changed: Any) -> MemorySettings:
    return MemorySettings(method, 4, 2, 64, "float32", checkpointing=False, stage=stage, **changed)


@pytest.mark.parametrize(("stage", "method"), [("dpo", "lora"), ("reward", "full"), ("grpo", "qlora"), ("ppo", "full")])
def test_predicted_is_measured(stage: str, method: str) -> None:
    """Law: within 2%, the issue's bar; what is missed is memory that an operator takes and gives back within itself."""
    settings = settings_of(stage, method)
    found = measure(SMALL, settings, device="cpu", work=step_work(settings))
    assert abs(found.error) < 0.02


def test_dpo_needs_what_sft_of_both_answers_needs() -> None:
    """Law: the reference costs nothing with LoRA: at most 1.1 times an SFT step on as many answers."""
    dpo = settings_of("dpo")
    sft = MemorySettings("lora", 8, 4, 64, "float32", checkpointing=False)
    peaks = [estimate(SMALL, dpo, device="cpu", work=step_work(dpo)), estimate(SMALL, sft, device="cpu")]
    assert peaks[0].peak_bytes <= 1.1 * peaks[1].peak_bytes
    assert peaks[0].weights == peaks[1].weights


def test_full_ppo_holds_the_base_twice() -> None:
    """Law: its KL term's reference is a second base, 4 bytes a parameter; GRPO's default has no KL term and none."""
    ppo, grpo = (settings_of(stage, "full") for stage in ("ppo", "grpo"))
    one, two = (estimate(SMALL, s, device="cpu", work=step_work(s)).weights for s in (grpo, ppo))
    assert two - one == 4 * (SMALL.n_params + SMALL.d_model + 1)  # and the value head


def test_rollouts_have_a_cache() -> None:
    """Worked by hand: 4 answers x 64 tokens x 5 layers x 2 heads x 16 numbers x (key and value) x 4 bytes."""
    grpo = settings_of("grpo")
    assert estimate(SMALL, grpo, device="cpu", work=step_work(grpo)).cache >= 4 * 64 * 5 * 2 * 16 * 2 * 4


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown stage 'dpoo'; choose sft, dpo"):
        settings_of("dpoo")
    with pytest.raises(ValueError, match="method generate trains nothing, so stage dpo has none"):
        settings_of("dpo", "generate")
    with pytest.raises(ValueError, match="stage dpo and its work go together"):
        estimate(SMALL, settings_of("dpo"), device="cpu")


def test_fits_are_searched() -> None:
    """Law: the largest batch of pairs is predicted to fit, and one pair more is not."""
    one = ModelConfig(100, d_model=16, n_layers=1, n_heads=1, n_kv_heads=1, d_head=16, d_ff=16, max_seq_len=8)
    dpo = MemorySettings("lora", 1, None, 8, "float32", stage="dpo")
    budget = estimate(one, replace(dpo, batch_size=2), device="cpu", work=step_work(dpo)).peak_bytes
    fits = find_fits(one, dpo, budget, methods=["lora"], device="cpu", work_of=step_work)
    assert [fit.batch_size for fit in fits if not fit.checkpointing] <= [2]
    assert max(fit.batch_size for fit in fits) >= 2
