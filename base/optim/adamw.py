"""AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2) over named parameters."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ...kernels.adamw import adamw_update_, read_steps
from .groups import Choice, decays, put_back, same_rate


class AdamW:
    """Decoupled weight decay Adam. Moments are float32 whatever the parameter's dtype.

    Takes (name, parameter) pairs; the names key the state on disk. Parameters without a gradient at a step are left
    as they are, and each parameter counts its own updates, as in torch.optim.AdamW.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, Tensor]],
        *,
        learning_rate: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        decay: Choice = decays,  # factor of weight_decay
        rate: Choice = same_rate,  # factor of the learning rate
    ) -> None:
        if learning_rate < 0:
            raise ValueError(f"learning_rate={learning_rate} is negative; use a value >= 0")
        if not (0 <= betas[0] < 1 and 0 <= betas[1] < 1):
            raise ValueError(f"betas={betas} must both lie in [0, 1)")
        self.named = list(parameters)
        if not self.named:
            raise ValueError("no parameter to train: all are frozen; attach an adapter or unfreeze the model")
        self.learning_rate, self.betas, self.eps, self.weight_decay = learning_rate, betas, eps, weight_decay
        self.steps = [0] * len(self.named)  # updates of each parameter
        self.groups = [(rate(name, p), weight_decay * decay(name, p)) for name, p in self.named]
        self.exp_avgs = [torch.zeros_like(p, dtype=torch.float32) for _, p in self.named]
        self.exp_avg_sqs = [torch.zeros_like(p, dtype=torch.float32) for _, p in self.named]

    @property
    def n_steps(self) -> int:
        """Updates so far, of the parameter that had most."""
        return max(self.steps)

    @torch.no_grad()
    def step(self, learning_rate: float | None = None) -> None:
        """One update in place from the parameters' .grad, at this learning rate."""
        lr = self.learning_rate if learning_rate is None else learning_rate
        for group in dict.fromkeys(self.groups):
            chosen = [i for i, (_, p) in enumerate(self.named) if p.grad is not None and self.groups[i] == group]
            if not chosen:
                continue
            for i in chosen:
                self.steps[i] += 1
            adamw_update_(
                [self.named[i][1] for i in chosen],
                [g for i in chosen if (g := self.named[i][1].grad) is not None],
                [self.exp_avgs[i] for i in chosen],
                [self.exp_avg_sqs[i] for i in chosen],
                step=[self.steps[i] for i in chosen],
                lr=lr * group[0],
                beta1=self.betas[0],
                beta2=self.betas[1],
                eps=self.eps,
                weight_decay=group[1],
            )

    def zero_grad(self) -> None:
        """Drop the gradients, so that their memory is free until the next backward pass."""
        for _, parameter in self.named:
            parameter.grad = None

    def state_tensors(self) -> dict[str, Tensor]:
        """Everything that resume needs, by name."""
        state = {"n_steps": torch.tensor(self.steps)}
        for i, (name, _) in enumerate(self.named):
            state[f"{name}.exp_avg"], state[f"{name}.exp_avg_sq"] = self.exp_avgs[i], self.exp_avg_sqs[i]
        return state

    def load_state_tensors(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state_tensors` gave. Raises ValueError when a parameter is missing or has another shape."""
        self.steps = read_steps(state.get("n_steps"), len(self.named))
        for i, (name, _) in enumerate(self.named):
            put_back(self.exp_avgs[i], state, f"{name}.exp_avg")
            put_back(self.exp_avg_sqs[i], state, f"{name}.exp_avg_sq")
