"""Memory of many adapters trained at once: the base and the activations once, four matrices for each number of each adapter."""

from collections.abc import Sequence

from ...base.model.config import ModelConfig
from ...base.train import TrainConfig
from ..adapters.config import LoraConfig
from .predict import estimate
from .settings import MemorySettings

Asked = tuple[TrainConfig, LoraConfig, int]  # a job's loop, its adapter, and positions of its longest row


def predict_jobs(
    config: ModelConfig,
    jobs: Sequence[Asked],
    *,
    at_once: int,  # jobs in training at a time
    method: str = "lora",
    double_quant: bool = True,
    device: str = "auto",
) -> int:
    """Peak bytes of a step of the `at_once` most demanding jobs together.

    It is the peak of one adapter on all their rows, with the stack's four buffers (weights, gradients, two moments) in place of
    its own. Every adapter counts with the largest rank, to which the stack pads them.
    """
    by_tokens = sorted(jobs, key=lambda job: -_rows(job[0]) * job[2])[:at_once]
    seq_len = max(longest for _, _, longest in by_tokens)
    n_tokens = sum(_rows(train) * longest for train, _, longest in by_tokens)
    rows = -(-n_tokens // seq_len)
    train = by_tokens[0][0]
    settings = MemorySettings(
        method=method,
        batch_size=rows,
        micro_batch=rows,
        seq_len=seq_len,
        dtype=train.dtype,
        checkpointing=train.checkpointing,
        rank=max(lora.rank for _, lora, _ in jobs),
        targets=tuple(dict.fromkeys(target for _, lora, _ in jobs for target in lora.targets)),
        double_quant=double_quant,
    )
    one = estimate(config, settings, device=device)
    adapter = one.adapters + one.gradients + one.optimizer
    return one.peak_bytes - one.at_peak.get("gradients", 0) + one.gradients + (at_once - 1) * adapter


def most_jobs(config: ModelConfig, job: Asked, budget: int, *, method: str = "lora", device: str = "auto") -> int:
    """How many jobs like this one fit into `budget` bytes together; 0 when not even one does."""
    from .fit import MOST_ROWS, largest

    return largest(
        lambda n: predict_jobs(config, [job] * n, at_once=n, method=method, device=device), budget, most=MOST_ROWS
    )


def _rows(train: TrainConfig) -> int:
    return min(train.micro_batch, train.batch_size)
