"""Resource accounting against answers worked by hand."""

from dataclasses import replace

import pytest

from graft.base.model.config import ModelConfig
from graft.base.model.presets import preset
from graft.base.plan import (
    BYTES_PER_PARAM,
    DEVICES,
    attention_flops_per_token,
    compute_optimal_params,
    compute_optimal_tokens,
    flops_per_token,
    largest_model,
    make_plan,
    matmul_intensity,
    ridge,
    training_flops,
    training_seconds,
)

TINY = ModelConfig(vocab_size=10, d_model=4, n_layers=2, n_heads=2, n_kv_heads=1, d_head=2, d_ff=8, max_seq_len=3)


def test_70b_on_15t_tokens_takes_143_days() -> None:
    """By hand: 6 * 70e9 * 15e12 = 6.3e24; 1,024 * 989.5e12 * 0.5 = 5.066e17 a second; 1.2435e7 s = 143.9 days.

    The course rounds down to 143.
    """
    seconds = training_seconds(training_flops(70e9, 15e12), n_devices=1024, device_flops=989.5e12, mfu=0.5)
    assert int(seconds / 86_400) == 143
    assert seconds == pytest.approx(6.3e24 / (1024 * 494.75e12))


def test_largest_model_with_adamw_on_8_times_80_gb() -> None:
    """By hand: 640e9 bytes / (4 weight + 4 gradient + 8 moments) = 40e9."""
    assert largest_model(8 * 80e9) == 40e9
    assert BYTES_PER_PARAM["adamw float32"] == 16


def test_compute_optimal_is_20_tokens_a_parameter() -> None:
    """Chinchilla's table 3: 400M parameters want 8.0B tokens. And the two functions are inverse: C = 6 N (20 N)."""
    assert compute_optimal_tokens(400e6) == 8.0e9
    assert compute_optimal_params(training_flops(1e9, 20e9)) == pytest.approx(1e9)


def test_flops_of_a_tiny_model() -> None:
    """By hand, 3 tokens: the queries see 1, 2 and 3 keys, 2 on average. A key costs 2 * Dh FLOPs for its score and as much
    for its value, with 2 heads of 2 in 2 layers 2 * 2 * 2 * 2 * 2 = 32 forward, 96 with the backward pass; 192 a token."""
    assert attention_flops_per_token(TINY, 3) == 192
    assert flops_per_token(TINY, 3) == 6 * TINY.n_params + 192
    untied = replace(TINY, tie_embeddings=False)  # the look-up is no product: the same FLOPs
    assert flops_per_token(untied, 3) == flops_per_token(TINY, 3)


def test_a_window_counts_its_own_keys() -> None:
    """By hand: with window 2 three queries see 1, 2 and 2 keys, 5/3 on average; 96 * 5/3 = 160."""
    assert attention_flops_per_token(replace(TINY, sliding_window=2), 3) == pytest.approx(160)
    assert attention_flops_per_token(replace(TINY, sliding_window=3), 3) == 192


def test_intensity() -> None:
    """By hand: a square n x n product in bfloat16 does 2 n^3 FLOPs on 6 n^2 bytes, n / 3; one row below 1.

    An H100 does 989.5e12 FLOPs in the time of 3.35e12 bytes: 295 a byte.
    """
    assert matmul_intensity(1024, 1024, 1024) == pytest.approx(1024 / 3)
    assert matmul_intensity(1, 4096, 11_008) < 1
    assert ridge(DEVICES["h100"]) == pytest.approx(295.4, abs=0.1)


def test_presets_have_their_published_sizes() -> None:
    """Parity with the papers' tables: Llama 6.7B, 13.0B, 32.5B, 65.2B; Llama 2 70B 69B; Llama 3 8B 8.03B."""
    published = {"llama-7b": 6.7, "llama-13b": 13.0, "llama-33b": 32.5, "llama-65b": 65.2, "llama-3-8b": 8.03}
    published |= {"llama-2-70b": 69.0, "qwen3-0.6b": 0.6, "qwen3-8b": 8.2, "qwen3-32b": 32.8}
    for name, billions in published.items():
        assert preset(name).n_params / 1e9 == pytest.approx(billions, rel=0.01), name


def test_a_plan_adds_up() -> None:
    plan = make_plan(preset("llama-7b"), n_tokens=1e12, n_devices=8, mfu=0.5)
    assert plan.flops == plan.flops_per_token * 1e12
    assert plan.seconds == pytest.approx(plan.flops / (8 * 989.5e12 * 0.5))
    assert plan.state_bytes["adamw float32"] == 16 * preset("llama-7b").n_params
    assert plan.attention_share == pytest.approx(12 * 32 * 4096 * 1024.5 / plan.flops_per_token)  # 3.9% at 2,048 tokens
    assert plan.intensity_decoding < plan.intensity_needed < plan.intensity_training
    assert plan.to_dict()["days"] == plan.days
    assert make_plan(preset("llama-7b")).n_tokens == 20 * preset("llama-7b").n_params


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"mfu=1.5 must lie"):
        training_seconds(1.0, device_flops=1.0, mfu=1.5)
    with pytest.raises(ValueError, match="n_devices=0"):
        training_seconds(1.0, device_flops=1.0, mfu=0.5, n_devices=0)
    with pytest.raises(ValueError, match="device_flops=0"):
        training_seconds(1.0, device_flops=0, mfu=0.5)
    with pytest.raises(ValueError, match="unknown optimizer 'lion'"):
        largest_model(1.0, optimizer="lion")
    with pytest.raises(ValueError, match="unknown device 'tpu'"):
        make_plan(TINY, device="tpu")
    with pytest.raises(ValueError, match="n_tokens=0"):
        make_plan(TINY, n_tokens=0)
    with pytest.raises(ValueError, match="seq_len=-1"):
        make_plan(TINY, seq_len=-1)
