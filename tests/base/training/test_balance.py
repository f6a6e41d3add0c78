"""Loads of the experts: the figures and the bias worked by hand, evened out in training, the same however a step is split."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from graft.base.loss import n_labels, next_token_loss
from graft.base.model.config import ModelConfig
from graft.base.model.experts import MixtureOfExperts
from graft.base.model.init import parameter_roles
from graft.base.model.transformer import Transformer, initialize_
from graft.base.precision import LossScaler
from graft.base.run import TrainConfig
from graft.base.training.balance import balance, move_bias_, start_counting
from graft.base.training.checkpoints import load_checkpoint, save_checkpoint
from graft.base.training.optimizers import Optimizer, make_optimizer
from graft.base.training.step import one_step

CONFIG = ModelConfig(
    61, d_model=16, n_layers=3, n_heads=2, n_kv_heads=2, d_head=8, d_ff=24, max_seq_len=32, qk_norm=False,
    n_experts=8, n_experts_per_token=2, d_expert=8, d_shared_expert=8, gate_shared_expert=False, router="sigmoid",
    router_bias=True, bias_rate=0.02, balance_loss=0.0, expert_layers=(False, True, True),
)  # fmt: skip
TRAIN = TrainConfig(steps=400, batch_size=8, learning_rate=1e-3, schedule="constant", warmup_steps=0)


def fresh(config: ModelConfig = CONFIG, **changes: object) -> tuple[Transformer, Optimizer]:
    model = Transformer(replace(config, **changes)).train()
    initialize_(model, seed=1)
    return model, make_optimizer(model.named_parameters(), TRAIN, roles=parameter_roles(model))


def batch(seed: int, rows: int = 8) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 61, (rows, 33), generator=torch.Generator().manual_seed(seed))
    return {"ids": ids[:, :-1], "targets": ids[:, 1:]}


def step(model: Transformer, optimizer: Optimizer, batches: list[dict[str, torch.Tensor]], **changes: object) -> dict:
    return one_step(
        model, optimizer, batches, replace(TRAIN, **changes), LossScaler("float32"), 0, next_token_loss, n_labels, "cpu"
    )


def mixtures_of(model: Transformer) -> list[MixtureOfExperts]:
    return [layer for layer in model.modules() if isinstance(layer, MixtureOfExperts)]


def same(*numbers: float) -> list[float]:
    return [*numbers]


def test_by_hand() -> None:
    """Known answers: loads 4 0 2 2 and 2 2 2 2 are at most 2 and 1 times the average, one expert idle; biases move by the rate
    towards the average, and not at all where the update was left out."""
    model, _ = fresh(n_experts=4)
    mixtures = start_counting(model)
    mixtures[0].load, mixtures[1].load = torch.tensor([4.0, 0.0, 2.0, 2.0]), torch.full((4,), 2.0)
    for updated in (False, True):
        figures = balance(mixtures, same, updated=updated)
        assert figures == {"expert_load_max": 2.0, "expert_load_mean": 1.5, "experts_idle": 1}
        expected = [-0.02, 0.02, 0.0, 0.0] if updated else [0.0] * 4
        assert mixtures[0].gate.e_score_correction_bias.tolist() == pytest.approx(expected)
    doubled = balance(mixtures, lambda *numbers: [2 * number for number in numbers], updated=False)
    assert doubled == figures  # two ranks alike


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_token_is_read_by_k_experts(checkpointing: bool) -> None:
    """Law: no token is dropped, and a new step counts anew; recomputation counts all twice."""
    model, optimizer = fresh()
    model.checkpointing = checkpointing
    for seed in range(2):
        line = step(model, optimizer, [batch(seed, rows=3), batch(seed + 9, rows=2)])
        for layer in mixtures_of(model):
            assert layer.load is not None
            assert layer.load.sum().item() == 5 * 32 * 2 * (1 + checkpointing)
        assert line["expert_load_max"] >= line["expert_load_mean"] >= 1


def test_a_bias_evens_the_load_without_a_loss() -> None:
    """Learning: one expert begins with a bias that most tokens follow. With weights that stand still the moved bias alone brings
    the busiest expert near the average (256 tokens, so not to 1); without its rate the load stays as it was."""
    ends = []
    for rate in (0.002, 0.0):
        model, optimizer = fresh(bias_rate=rate)
        for layer in mixtures_of(model):
            layer.gate.e_score_correction_bias.data[0] = 0.03
        lines = [step(model, optimizer, [batch(seed)], learning_rate=1e-12) for seed in range(20)]
        ends.append([sum(line["expert_load_max"] for line in part) / 5 for part in (lines[:5], lines[-5:])])
    (before, after), (still, unmoved) = ends
    assert before > 2.5
    assert after < 1.6
    assert unmoved == pytest.approx(still, rel=0.1)


def test_a_split_step_moves_the_bias_alike() -> None:
    """Law: one micro-batch of 8 rows and four of 2 count the same tokens; the optimizer itself leaves the bias alone."""
    whole = batch(0)
    found = []
    for size in (8, 2):
        model, optimizer = fresh()
        pieces = [{name: t[i : i + size] for name, t in whole.items()} for i in range(0, 8, size)]
        step(model, optimizer, pieces)
        found.append(torch.stack([layer.gate.e_score_correction_bias.detach() for layer in mixtures_of(model)]))
    assert torch.equal(*found)
    assert found[0].abs().max().item() == pytest.approx(0.02)


def test_a_checkpoint_has_the_bias(tmp_path: Path) -> None:
    """Law: what a run had moved, its resumption begins with."""
    model, optimizer = fresh()
    step(model, optimizer, [batch(0)])
    save_checkpoint(tmp_path, 1, optimizer, LossScaler("float32"))
    other, other_optimizer = fresh()
    load_checkpoint(tmp_path, other_optimizer, LossScaler("float32"))
    for ours, theirs in zip(mixtures_of(model), mixtures_of(other), strict=True):
        assert ours.gate.e_score_correction_bias.abs().max() > 0
        assert torch.equal(ours.gate.e_score_correction_bias, theirs.gate.e_score_correction_bias)


def test_what_does_not_train_is_not_counted() -> None:
    """Law: a frozen router's load is no figure, nor is a dense model's; an evaluation counts nothing."""
    model, _ = fresh()
    mixtures = start_counting(model)
    with torch.no_grad():
        model.eval()(batch(0)["ids"])
    assert not any(layer.load.any() for layer in mixtures if layer.load is not None)
    model.requires_grad_(False)
    assert start_counting(model) == []
    assert balance([], same, updated=True) == {}


def test_a_divided_bias_moves_by_its_part(tmp_path: Path) -> None:
    """Law: a bias that lies divided over ranks (one here) is moved as a whole one is."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        router = mixtures_of(fresh()[0])[0].gate
        divided = distribute_tensor(torch.arange(8.0), init_device_mesh("cpu", (1,)), [Shard(0)])
        router.e_score_correction_bias = torch.nn.Parameter(divided)
        with torch.no_grad():
            move_bias_(router, torch.full((8,), 0.5))
        assert router.e_score_correction_bias.full_tensor().tolist() == [i + 0.5 for i in range(8)]
    finally:
        dist.destroy_process_group()
