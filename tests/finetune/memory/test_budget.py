"""memory_budget and recompute_layers: the fewest layers that fit, the allocator's peak, the same gradients; what is refused."""

from dataclasses import replace

import pytest
import torch

from graft.base.model.config import ModelConfig
from graft.base.model.transformer import Transformer, initialize_
from graft.base.parallel.mesh import check_mesh, parse_mesh
from graft.base.run import Run, TrainConfig
from graft.finetune.adapters.config import LoraConfig
from graft.finetune.align.run_dpo import DPOOptions
from graft.finetune.align.setup import parts, resolve
from graft.finetune.many.jobs import check_config
from graft.finetune.memory.budget import fewest, recomputing, within_budget
from graft.finetune.memory.measure import measure
from graft.finetune.memory.predict import predict_run
from graft.finetune.memory.settings import MemorySettings

CONFIG = ModelConfig(200, 32, 3, 4, 2, 8, 96, 64)
TRAIN = TrainConfig(batch_size=8, micro_batch=8)


def test_fewest_by_hand() -> None:
    """By hand: peaks 90, 80, 60, 55, 50; also where all or none fit, and with each peak asked for at most log2 times."""
    peaks, asked = [90, 80, 60, 55, 50], []

    def peak(n: int) -> int:
        asked.append(n)
        return peaks[n]

    assert [fewest(peak, 4, budget) for budget in (90, 89, 60, 50, 49)] == [(0, 90), (1, 80), (2, 60), (4, 50), (4, 50)]
    assert len(asked) <= 5 * 4


def test_the_budget_decides_how_many_layers() -> None:
    """Law: the peak chosen is within the budget and that of one layer less is not; all and none are found too."""
    peaks = [
        predict_run(CONFIG, method="full", train=recomputing(TRAIN, n), seq_len=64, device="cpu") for n in range(5)
    ]
    assert peaks == sorted(peaks, reverse=True)
    assert len(set(peaks)) == 4
    budget = (peaks[2] + peaks[1]) // 2
    chosen = within_budget(CONFIG, replace(TRAIN, memory_budget=f"{budget}B"), "cpu")
    assert (chosen.checkpointing, chosen.recompute_layers) == (True, 2)
    assert within_budget(CONFIG, chosen, "cpu").recompute_layers == 2  # a resumed run finds the same
    ample = within_budget(CONFIG, replace(TRAIN, memory_budget="1GiB"), "cpu")
    assert (ample.checkpointing, ample.recompute_layers) == (False, None)
    assert within_budget(CONFIG, TRAIN, "cpu") is TRAIN
    with pytest.raises(ValueError, match=r"memory_budget=1KiB: with all 3 layers recomputed the predicted peak is"):
        within_budget(CONFIG, replace(TRAIN, memory_budget="1KiB"), "cpu")
    with pytest.raises(ValueError, match="'lots' is no amount of memory"):
        within_budget(CONFIG, replace(TRAIN, memory_budget="lots"), "cpu")
    with pytest.raises(ValueError, match="recompute_layers=2 is how many layers checkpointing recomputes"):
        TrainConfig(recompute_layers=2)


def test_some_layers_recomputed_meet_the_allocator() -> None:
    """Parity: within 1% of PyTorch's allocator; the first layers keep their input alone."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    settings = MemorySettings(batch_size=4, seq_len=64, dtype="float32", recompute_layers=2)
    found = measure(replace(CONFIG, d_model=64, d_head=16), settings, device="cpu")
    torch.set_num_threads(threads)
    assert abs(found.error) < 0.01
    kept = found.predicted.activations
    assert kept[0] == kept[1] < kept[2] / 4


def test_gradients_stay() -> None:
    """Law: bit for bit those without recomputation."""
    ids, gradients = torch.randint(0, 200, (2, 20), generator=torch.Generator().manual_seed(0)), []
    for n in (None, 1, 3):
        model = Transformer(CONFIG).train()
        initialize_(model, seed=0)
        model.checkpointing, model.recompute_layers = n is not None, n
        model(ids, ids).backward()
        gradients.append([p.grad for p in model.parameters()])
    for one in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], one, strict=True))


def test_stages_that_can_not_are_named() -> None:
    """Law: what alignment and jobs that train together don't do is refused by name, compilation too."""
    for settings in ({"compile": True}, {"memory_budget": "1GiB"}, {"checkpointing": True, "recompute_layers": 1}):
        name = [*settings][-1]
        train = TrainConfig(**settings)
        with pytest.raises(
            ValueError, match=f"{name}={getattr(train, name)} is not covered for jobs that train together"
        ):
            check_config(Run(train=train, lora=LoraConfig()))
        with pytest.raises(ValueError, match=f"{name}={getattr(train, name)} is of pretraining and SFT"):
            resolve(settings | {"steps": 2}, parts(DPOOptions), method="lora", defaults={"batch_size": 2}, inputs={})


def test_a_pipeline_recomputes_all_layers_or_none() -> None:
    train = replace(TRAIN, checkpointing=True, recompute_layers=1)
    with pytest.raises(ValueError, match="recompute_layers=1 counts layers from the first one"):
        check_mesh(parse_mesh("pp:3", 3), train, CONFIG)
