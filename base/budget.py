"""Depth and tokens for a time budget on this machine, from steps that are timed here and now."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .model.config import ModelConfig
from .plan import flops_per_token
from .recipe import LARGEST_DEPTH, RECIPE, Recipe, model_at, training

FIRST_DEPTHS = (2, 4)  # that are timed before one is chosen; the chosen one is timed too
OVERHEAD = 0.05  # of the time: start, evaluations, checkpoints
ROUNDS = 3  # of timed steps; their median counts
Timer = Callable[
    [ModelConfig, int], tuple[float, float]
]  # (model, micro_batch) -> seconds of a micro-batch, of an update


@dataclass(frozen=True)
class Measured:
    """What a depth does on this machine."""

    depth: int
    n_params: int
    tokens_per_s: float  # at the recipe's batch, the update's share included
    flops_per_s: float  # reached


@dataclass(frozen=True)
class BudgetPlan:
    """The depth whose compute-optimal tokens the budget just pays, and the run that fills it."""

    depth: int
    n_params: int
    n_tokens: int
    tokens_per_param: float
    settings: dict[str, Any]  # steps, batch and rate by the recipe
    seconds: float  # predicted
    tokens_per_s: float
    measured: tuple[Measured, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def plan_budget(
    seconds: float, *, vocab_size: int, timer: Timer, n_ranks: int = 1, recipe: Recipe = RECIPE
) -> BudgetPlan:
    """Choose depth and tokens for so many seconds. Raises ValueError for a budget that no step fits into.

    Seconds a token are a line in FLOPs a token through the timed depths: the constant is what does not grow with the model.
    The largest depth is chosen whose compute-optimal tokens fit; then it is timed itself, and its tokens fill the budget.
    """
    del n_ranks
    if not seconds > 0:
        raise ValueError(f"the budget is {seconds} seconds; give more than 0, such as 20min")
    usable = seconds * (1 - OVERHEAD)
    timed = {depth: _measure(depth, vocab_size, timer, recipe) for depth in FIRST_DEPTHS}
    depth = _largest(usable, timed, vocab_size, recipe)
    for _ in range(2):  # a depth beyond the timed ones may turn out slower
        if depth not in timed:
            timed[depth] = _measure(depth, vocab_size, timer, recipe)
        chosen = _largest(usable, timed, vocab_size, recipe)
        if chosen == depth:
            break
        depth = chosen
    if depth not in timed:
        timed[depth] = _measure(depth, vocab_size, timer, recipe)
    model, per_s = model_at(depth, vocab_size, recipe), timed[depth].tokens_per_s
    settings = training(model, usable * per_s, recipe)
    n_tokens = settings["steps"] * settings["batch_size"] * model.max_seq_len
    if n_tokens / per_s > 2 * usable:
        raise ValueError(
            f"{seconds:.0f} s don't pay for one step of {n_tokens:,} tokens at {per_s:,.0f} tokens/s; give a longer budget"
        )
    return BudgetPlan(
        depth=depth,
        n_params=model.n_params,
        n_tokens=n_tokens,
        tokens_per_param=n_tokens / model.n_params,
        settings=settings,
        seconds=n_tokens / per_s / (1 - OVERHEAD),
        tokens_per_s=per_s,
        measured=tuple(timed[depth] for depth in sorted(timed)),
    )


def _measure(depth: int, vocab_size: int, timer: Timer, recipe: Recipe) -> Measured:
    model = model_at(depth, vocab_size, recipe)
    settings = training(model, None, recipe)
    micro_s, update_s = timer(model, settings["micro_batch"])
    n_micro = -(-settings["batch_size"] // settings["micro_batch"])
    per_s = settings["batch_size"] * model.max_seq_len / (n_micro * micro_s + update_s)
    return Measured(depth, model.n_params, per_s, per_s * flops_per_token(model, model.max_seq_len))


def _largest(usable: float, timed: dict[int, Measured], vocab_size: int, recipe: Recipe) -> int:
    """The largest depth whose compute-optimal tokens take no more than `usable` seconds; 1 when none does."""

    def cost(depth: int) -> tuple[float, float]:
        model = model_at(depth, vocab_size, recipe)
        return model.n_params * recipe.tokens_per_param, flops_per_token(model, model.max_seq_len)

    constant, slope = line([cost(depth)[1] for depth in timed], [1 / one.tokens_per_s for one in timed.values()])
    best = 1
    for depth in range(1, LARGEST_DEPTH + 1):
        tokens, flops = cost(depth)
        per_token = 1 / timed[depth].tokens_per_s if depth in timed else constant + slope * flops
        if tokens * per_token > usable:
            break
        best = depth
    return best


def line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """(constant, slope) of the least squares through the points, neither below 0: time doesn't fall with work."""
    slope, constant = statistics.linear_regression(x, y)
    if slope <= 0 or constant < 0:  # noise: all of the time goes with the work
        return 0.0, sum(y) / sum(x)
    return constant, slope


def time_steps(
    model: ModelConfig, micro_batch: int, *, device: str, optimizer: str = RECIPE.optimizer
) -> tuple[float, float]:
    """Seconds of one micro-batch forward and backward, and of one update, with random weights and ids."""
    import torch

    from .model.init import parameter_roles
    from .model.transformer import Transformer, initialize_
    from .precision import LossScaler
    from .run import TrainConfig
    from .training.objective import NextToken
    from .training.optimizers import make_optimizer
    from .training.step import one_step

    net = Transformer(model).to(device)
    initialize_(net, seed=0)
    config = TrainConfig(optimizer=optimizer)
    optim, objective = make_optimizer(net.named_parameters(), config, roles=parameter_roles(net)), NextToken()
    rows = torch.randint(
        model.vocab_size, (micro_batch, model.max_seq_len + 1), generator=torch.Generator().manual_seed(0)
    )
    batch = {"ids": rows[:, :-1], "targets": rows[:, 1:]}

    def seconds(n_micro: int) -> float:
        began = time.perf_counter()
        one_step(
            net,
            optim,
            [batch] * n_micro,
            config,
            LossScaler(config.dtype),
            0,
            objective.loss,
            objective.n_labels,
            device,
        )
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter() - began

    seconds(1)  # compiles, allocates
    pairs = [(seconds(1), seconds(2)) for _ in range(ROUNDS)]
    micro = statistics.median(max(two - one, one * 0.1) for one, two in pairs)
    return micro, max(0.0, statistics.median(one for one, _ in pairs) - micro)
