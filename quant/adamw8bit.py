"""AdamW whose moments take 8 bits each (Dettmers et al. 2022, arXiv:2110.02861), in blocks of 256 that share an absmax."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import nf4
from ..kernels.adamw import adamw_update_, read_steps
from .codebooks import dynamic8

BLOCK_SIZE = 256
SMALLEST_SIZE = 4096  # tensors below keep float32 moments, as in the paper: they cost little and are the sensitive ones
CHUNK = 2**22  # values of a parameter that are in float32 at a time: 32 MiB for both moments


def decays(name: str, parameter: Tensor) -> float:
    """Weight decay acts on matrices; norms and biases are vectors and are left alone."""
    del name
    return parameter.ndim >= 2


def same_rate(name: str, parameter: Tensor) -> float:
    """One learning rate for all."""
    del name, parameter
    return 1.0


@dataclass(frozen=True)
class Moment8bit:
    """One moment of one parameter: the signed map for the first, the unsigned one, of twice the steps, for the second."""

    codes: Tensor  # (n,) uint8
    absmax: Tensor  # (ceil(n / 256),) float32
    signed: bool

    @classmethod
    def zeros(cls, n: int, *, signed: bool, device: torch.device | str, pinned: bool = False) -> "Moment8bit":
        """All zero. `pinned`: in page-locked host memory."""
        codes = torch.full((n,), dynamic8(signed).index(0.0), dtype=torch.uint8, device=device, pin_memory=pinned)
        return cls(codes, torch.zeros(-(-n // BLOCK_SIZE), device=device, pin_memory=pinned), signed)

    def read(self, chunk: slice, device: torch.device) -> Tensor:
        """A chunk in float32 on the device."""
        codes, absmax = self.codes[chunk], self.absmax[blocks_of(chunk)]
        codes, absmax = codes.to(device, non_blocking=True), absmax.to(device, non_blocking=True)
        codebook = torch.tensor(dynamic8(self.signed), dtype=torch.float32, device=device)
        return nf4.dequantize_8bit(codes, absmax, codebook, BLOCK_SIZE)

    def write_(self, chunk: slice, values: Tensor) -> None:
        """Put a chunk back, quantized."""
        codes, absmax = nf4.quantize_8bit(values, bounds_of(self.signed, values.device), BLOCK_SIZE)
        self.codes[chunk].copy_(codes, non_blocking=True)
        self.absmax[blocks_of(chunk)].copy_(absmax, non_blocking=True)


def bounds_of(signed: bool, device: torch.device) -> Tensor:  # (255,)
    """Between which values each code is chosen: half way, but above zero a second moment never becomes zero.

    A first moment over the root of a second one that rounding made zero would be a step of m / eps.
    """
    codebook = torch.tensor(dynamic8(signed), dtype=torch.float32, device=device)
    middle = (codebook[:-1] + codebook[1:]) / 2
    return middle if signed else torch.cat([middle.new_zeros(1), middle[1:]])


def blocks_of(chunk: slice) -> slice:
    """The absmax of a chunk's blocks; chunks start where a block starts."""
    return slice(chunk.start // BLOCK_SIZE, -(-chunk.stop // BLOCK_SIZE))


class AdamW8bit:
    """Decoupled weight decay Adam over (name, parameter) pairs, in the interface of base.optim's AdamW.

    Two bytes a parameter for the moments (2.03 with the absmax) in place of eight. `paged` keeps them in the host's memory
    and brings a chunk to the device for its update; on the CPU that changes nothing. Parameters without a gradient at a
    step are left as they are, and each parameter counts its own updates, as in torch.optim.AdamW. Small tensors (below
    4,096 values) have float32 moments.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, Tensor]],
        *,
        learning_rate: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        decay: Callable[[str, Tensor], float] = decays,  # factor of weight_decay
        rate: Callable[[str, Tensor], float] = same_rate,  # factor of the learning rate
        paged: bool = False,
    ) -> None:
        if learning_rate < 0:
            raise ValueError(f"learning_rate={learning_rate} is negative; use a value >= 0")
        if not (0 <= betas[0] < 1 and 0 <= betas[1] < 1):
            raise ValueError(f"betas={betas} must both lie in [0, 1)")
        self.named = list(parameters)
        if not self.named:
            raise ValueError("no parameter to train: all are frozen; attach an adapter or unfreeze the model")
        for name, parameter in self.named:
            if not parameter.is_contiguous():
                raise ValueError(f"parameter {name} with strides {parameter.stride()} is not contiguous; make it so")
        self.learning_rate, self.betas, self.eps, self.weight_decay = learning_rate, betas, eps, weight_decay
        self.steps = [0] * len(self.named)  # updates of each parameter
        self.groups = [(rate(name, p), weight_decay * decay(name, p)) for name, p in self.named]
        self.full: dict[int, tuple[Tensor, Tensor]] = {}  # both moments in float32, of the small ones by position
        self.quantized: dict[int, tuple[Moment8bit, Moment8bit]] = {}
        for i, (_, parameter) in enumerate(self.named):
            if parameter.numel() < SMALLEST_SIZE:
                self.full[i] = (
                    torch.zeros_like(parameter, dtype=torch.float32),
                    torch.zeros_like(parameter, dtype=torch.float32),
                )
                continue
            pinned = paged and parameter.device.type == "cuda"
            device = "cpu" if pinned else parameter.device
            first, second = (
                Moment8bit.zeros(parameter.numel(), signed=signed, device=device, pinned=pinned)
                for signed in (True, False)
            )
            self.quantized[i] = (first, second)

    @property
    def n_steps(self) -> int:
        """Updates so far, of the parameter that had most."""
        return max(self.steps)

    @torch.no_grad()
    def step(self, learning_rate: float | None = None) -> None:
        """One update in place from the parameters' .grad, at this learning rate."""
        lr = self.learning_rate if learning_rate is None else learning_rate
        gradients = {i: parameter.grad for i, (_, parameter) in enumerate(self.named) if parameter.grad is not None}
        for i in gradients:
            self.steps[i] += 1
        for group in dict.fromkeys(self.groups):
            small = [i for i in self.full if i in gradients and self.groups[i] == group]
            if small:
                params, grads = [self.named[i][1] for i in small], [gradients[i] for i in small]
                steps = [self.steps[i] for i in small]
                self._update(params, grads, [self.full[i] for i in small], steps, lr, group)
        for i, (first, second) in self.quantized.items():
            if i not in gradients:
                continue
            flat, grad = self.named[i][1].detach().view(-1), gradients[i].reshape(-1)
            for chunk in chunks(flat.numel()):
                moments = first.read(chunk, flat.device), second.read(chunk, flat.device)
                self._update([flat[chunk]], [grad[chunk]], [moments], [self.steps[i]], lr, self.groups[i])
                first.write_(chunk, moments[0])
                second.write_(chunk, moments[1])

    def _update(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        moments: list[tuple[Tensor, Tensor]],
        steps: list[int],
        lr: float,
        group: tuple[float, float],  # factor of the rate, and weight decay
    ) -> None:
        adamw_update_(
            params,
            grads,
            [first for first, _ in moments],
            [second for _, second in moments],
            step=steps,
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
        """Everything that resume needs, by name; the moments themselves, not copies."""
        if any(second.codes.is_pinned() for _, second in self.quantized.values()):
            torch.cuda.synchronize()  # paged moments may still be on their way to the host
        return {"n_steps": torch.tensor(self.steps)} | self._moments()

    def _moments(self) -> dict[str, Tensor]:
        """The moments by name, not copied."""
        state: dict[str, Tensor] = {}
        for i, (name, _) in enumerate(self.named):
            if i in self.full:
                state[f"{name}.exp_avg"], state[f"{name}.exp_avg_sq"] = self.full[i]
            else:
                for kind, moment in zip(("exp_avg", "exp_avg_sq"), self.quantized[i], strict=True):
                    state[f"{name}.{kind}_q"], state[f"{name}.{kind}_absmax"] = moment.codes, moment.absmax
        return state

    def load_state_tensors(self, state: Mapping[str, Tensor]) -> None:
        """Put back what `state_tensors` gave. Raises ValueError when a tensor is missing or has another shape."""
        steps = read_steps(state.get("n_steps"), len(self.named))
        for name, target in self._moments().items():
            saved = state.get(name)
            if saved is None or saved.shape != target.shape or saved.dtype != target.dtype:
                got = "nothing" if saved is None else f"{tuple(saved.shape)} {saved.dtype}"
                raise ValueError(
                    f"optimizer state {name}: expected {tuple(target.shape)} {target.dtype}, got {got}; "
                    "resume with the config that the run was started with"
                )
            target.copy_(saved)
        self.steps = steps


def chunks(n: int) -> Iterator[slice]:
    """0..n in slices of CHUNK."""
    for start in range(0, n, CHUNK):
        yield slice(start, min(start + CHUNK, n))
