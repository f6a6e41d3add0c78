"""Many adapters trained at once on one frozen base: their matrices stacked, their low-rank products batched over the jobs.

The batch's tokens lie grouped by job, in the order of the stack. The base's linear runs once over all of them; what each
adapter adds is one batched product over every run of neighboring jobs with equally many tokens:

    tokens      job 0 job 0 | job 1 job 1 | job 2           N rows of x (N, in)
    segments    jobs 0-1: (2, 2, in) x (2, in, R)   job 2: (1, 1, in) x (1, in, R)

Ranks are padded with zeros to the largest. A zero row of A with a zero column of B has the gradient zero, so the padding stays
zero under AdamW, and so does the whole update of a job that doesn't adapt a layer.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...kernels.adamw import adamw_update_, read_steps
from ...kernels.checks import has_values
from .lora import LoRALinear, LowRank, base_gradient, lora_layers, module_key, run_base
from .selection import choosing, registry_of

KINDS = ("weights", "gradients", "exp_avgs", "exp_avg_sqs")


class Segment(NamedTuple):
    """Neighboring jobs of the stack that have equally many tokens in the batch."""

    jobs: slice  # of the stack
    tokens: slice  # of the batch, flattened


def segments_of(counts: Sequence[int]) -> list[Segment]:
    """Tokens of each job of the stack, in its order -> the fewest segments; jobs without tokens are in none.

    [4, 4, 2] -> jobs 0-1 with tokens 0-7, job 2 with tokens 8-9.
    """
    found: list[Segment] = []
    n_tokens = 0
    first = 0
    for job, count in enumerate(counts):
        last = job + 1 == len(counts)
        if last or counts[job + 1] != count:
            size = (job + 1 - first) * count
            if size:
                found.append(Segment(slice(first, job + 1), slice(n_tokens, n_tokens + size)))
            n_tokens, first = n_tokens + size, job + 1
    return found


class StackedLayer(NamedTuple):
    """What one linear needs of the stack: views of its buffers."""

    a: Tensor  # (K, R, in)
    b: Tensor  # (K, R, out): transposed, as the products want it
    da: Tensor  # (K, R, in): gradients are added here in the backward pass
    db: Tensor  # (K, R, out)
    scales: Tensor  # (K, 1, 1)
    dropouts: list[float]  # of each job; 0 where the job doesn't adapt this layer


class AdapterStack:
    """The named adapters of a model as rows of four (K, P) buffers: weights, gradients and AdamW's two moments.

    Row k holds job k's A (R, in) and B (R, out) of every linear, one after the other, R being the largest rank there. The
    model's own adapter parameters become views of it, so that evaluating, saving and naming them work as for one adapter, while
    norms, clipping and updates act on whole rows. Each job draws its dropout from a generator of its own.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], generators: Sequence[torch.Generator]) -> None:
        self.model, self.registry = model, registry_of(model)
        self.names: list[str] = []
        self.generators: list[torch.Generator] = []
        self.n_updates: list[int] = []
        self.layers: dict[int, StackedLayer] = {}  # by the registry's slot
        self.offsets: dict[str, tuple[int, int, int, int]] = {}  # path -> where A begins, R, in, out
        self.buffers: dict[str, Tensor] = {}
        self.segments: list[Segment] = []
        self._collected: list[tuple[int, tuple[float, ...]]] | None = None  # updates to make together
        self.anchor = torch.zeros((), requires_grad=True)  # so that outputs carry a gradient whatever the input does
        self.set_jobs(names, generators)

    @torch.no_grad()
    def set_jobs(self, names: Sequence[str], generators: Sequence[torch.Generator]) -> None:
        """These adapters from now on, in this order. Those that were here keep their moments; gradients are dropped."""
        before = {name: {kind: self.views(kind, name) for kind in KINDS} for name in self.names if name in names}
        counts = dict(zip(self.names, self.n_updates, strict=True))
        own = {
            name: {path: layer.updates[name] for path, layer in lora_layers(self.model) if name in layer.updates}
            for name in names
        }
        self.names, self.generators = list(names), list(generators)
        self.n_updates = [counts.get(name, 0) for name in names]
        self.offsets, size = {}, 0
        for path, layer in lora_layers(self.model):
            updates = [own[name][path] for name in names if path in own[name]]
            if updates:
                rank = max(update.lora_a.shape[0] for update in updates)
                self.offsets[path] = (size, rank, layer.in_features, layer.out_features)
                size += rank * (layer.in_features + layer.out_features)
        one = next(iter(next(iter(own.values())).values()))
        device = one.lora_a.device
        self.anchor = torch.zeros((), requires_grad=True, device=device)
        self.buffers = {kind: torch.zeros(len(names), size, device=device) for kind in KINDS}
        for name in names:
            for kind in ("weights", "exp_avgs", "exp_avg_sqs"):
                for path, (a, b) in self.views(kind, name, own[name]).items():
                    source = (own[name][path].lora_a, own[name][path].lora_b)
                    if kind != "weights":
                        if name not in before:
                            continue
                        source = before[name][kind][path]
                    a.copy_(source[0])
                    b.copy_(source[1])
            for path, (a, b) in self.views("weights", name, own[name]).items():
                update = own[name][path]
                update.lora_a = nn.Parameter(a, requires_grad=False)
                update.lora_b = nn.Parameter(b, requires_grad=False)
        self._make_layers(own)
        self.registry.changed()

    def _make_layers(self, own: dict[str, dict[str, LowRank]]) -> None:
        self.layers = {}
        for path, layer in lora_layers(self.model):
            if path not in self.offsets:
                continue
            a, b = self._stacked("weights", path)
            updates = [own[name].get(path) for name in self.names]
            scales = torch.tensor([0.0 if u is None else u.scale for u in updates], device=a.device)
            dropouts = [0.0 if u is None else u.dropout for u in updates]
            self.layers[layer.slot] = StackedLayer(
                a, b, *self._stacked("gradients", path), scales[:, None, None], dropouts
            )

    def _stacked(self, kind: str, path: str) -> tuple[Tensor, Tensor]:
        """All jobs' A (K, R, in) and B (K, R, out) of one layer."""
        start, rank, n_in, n_out = self.offsets[path]
        middle = start + rank * n_in
        buffer = self.buffers[kind]
        a, b = buffer[:, start:middle], buffer[:, middle : middle + rank * n_out]
        return a.unflatten(1, (rank, n_in)), b.unflatten(1, (rank, n_out))

    def views(self, kind: str, name: str, own: dict[str, LowRank] | None = None) -> dict[str, tuple[Tensor, Tensor]]:
        """Path -> one job's A (rank, in) and B (out, rank) in a buffer, without the padding."""
        row = self.names.index(name)
        if own is None:
            own = {path: layer.updates[name] for path, layer in lora_layers(self.model) if name in layer.updates}
        found = {}
        for path, update in own.items():
            rank = update.lora_a.shape[0]
            a, b = self._stacked(kind, path)
            found[path] = a[row, :rank], b[row, :rank].T
        return found

    @contextmanager
    def training(self, counts: Sequence[int]) -> Iterator[None]:
        """Within the block the model's calls take counts[k] tokens of job k, in the stack's order; backward inside it too."""
        self.segments = segments_of(counts)
        with choosing(self.registry, self):
            yield

    def forward(self, layer: LoRALinear, x: Tensor) -> Tensor:
        """(..., in) -> (..., out): the base, plus each job's update on its own tokens."""
        stacked = self.layers.get(layer.slot)
        if stacked is None:
            return layer.base(x)
        mask = self._dropout(stacked, x) if layer.training and any(stacked.dropouts) else None
        return StackedUpdate.apply(x, self.anchor, mask, stacked, self.segments, layer.base)  # pyright: ignore[reportReturnType]

    def _dropout(self, stacked: StackedLayer, x: Tensor) -> Tensor:
        """0 or 1 / (1 - p) for each number of x, (N, in), drawn from each job's own generator as F.dropout draws it."""
        mask = torch.ones_like(x).reshape(-1, x.shape[-1])
        for segment in self.segments:
            parts = mask[segment.tokens].chunk(segment.jobs.stop - segment.jobs.start)
            for job, part in zip(range(segment.jobs.start, segment.jobs.stop), parts, strict=True):
                if p := stacked.dropouts[job]:
                    part.bernoulli_(1 - p, generator=self.generators[job]).div_(1 - p)
        return mask

    def clip_(self, limits: Sequence[float]) -> list[float]:
        """Clip each job's gradient to its own 2-norm, as base/optim/clip.py does for one; returns the norms before.

        A gradient that is not finite stays as it is.
        """
        gradients = self.buffers["gradients"]
        norms = torch.linalg.vector_norm(gradients, dim=1)  # (K,)
        factors = (torch.tensor(limits, device=norms.device) / (norms + 1e-6)).clamp(max=1.0)
        if not has_values(norms):  # memory is predicted: clipping takes none
            return [1.0] * len(limits)
        found, scales = torch.stack([norms, factors]).tolist()
        for row, (norm, scale) in enumerate(zip(found, scales, strict=True)):
            if scale < 1 and math.isfinite(norm):
                gradients[row] *= factors[row]
        return found

    @contextmanager
    def updating(self) -> Iterator[None]:
        """Within the block the rows' updates are collected; at its end they are made in one fused call for all rows of one
        learning rate (and betas, eps, decay), and all gradients are zero."""
        self._collected = []
        try:
            yield
            groups: dict[tuple[float, ...], list[int]] = {}
            for row, key in self._collected:
                groups.setdefault(key, []).append(row)
            for key, rows in groups.items():
                self._update_rows(rows, *key)
            self.buffers["gradients"].zero_()
        finally:
            self._collected = None

    def update_row(self, row: int, *how: float) -> None:
        """One AdamW update of a row: lr, beta1, beta2, eps, weight_decay."""
        self.n_updates[row] += 1
        if self._collected is None:
            self._update_rows([row], *how)
        else:
            self._collected.append((row, how))

    def zero_row(self, row: int) -> None:
        """Set a row's gradients to zero, also where they were NaN."""
        if self._collected is None:
            self.buffers["gradients"][row].zero_()

    def _update_rows(
        self, rows: Sequence[int], lr: float, beta1: float, beta2: float, eps: float, weight_decay: float
    ) -> None:
        weights, gradients, exp_avgs, exp_avg_sqs = ([self.buffers[kind][row] for row in rows] for kind in KINDS)
        adamw_update_(
            weights,
            gradients,
            exp_avgs,
            exp_avg_sqs,
            step=[self.n_updates[row] for row in rows],
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            weight_decay=weight_decay,
        )


class StackedUpdate(torch.autograd.Function):
    """y = base(x) + scale_k * (x A_k^T) B_k^T on the tokens of job k, with a frozen base.

    With u = scale * dy B (n, T, R) over the n jobs of a segment:   dA += u^T x,   dB += (scale * x A^T)^T dy,   dx = dy W + u A.
    dA and dB are added into the stack's gradients by the products themselves, so autograd neither allocates nor copies them.
    """

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        x: Tensor,  # (..., in)
        anchor: Tensor,  # requires a gradient, and gets none
        mask: Tensor | None,  # (N, in): dropout's factors
        stacked: StackedLayer,
        segments: Sequence[Segment],
        base: nn.Module,
    ) -> Tensor:  # (..., out)
        ctx.edge, ctx.weight = None, None
        out = run_base(ctx, base, x)
        rows = x.reshape(-1, x.shape[-1]).to(out.dtype)  # (N, in)
        if mask is not None:
            rows = rows * mask
        a, b = stacked.a.to(out.dtype), stacked.b.to(out.dtype)
        scales = stacked.scales.to(out.dtype)
        flat = out.view(-1, out.shape[-1])  # (N, out)
        inners = []
        for jobs, tokens in segments:
            n = jobs.stop - jobs.start
            inner = torch.bmm(rows[tokens].unflatten(0, (n, -1)), a[jobs].mT).mul_(scales[jobs])  # (n, T, R)
            flat[tokens].unflatten(0, (n, -1)).baddbmm_(inner, b[jobs])
            inners.append(inner)
        ctx.stacked, ctx.segments, ctx.x_shape, ctx.x_dtype = stacked, segments, x.shape, x.dtype
        ctx.save_for_backward(rows, a, b, mask, *inners)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        rows, a, b, mask, *inners = ctx.saved_tensors
        stacked: StackedLayer = ctx.stacked
        dy = grad.reshape(-1, grad.shape[-1])  # (N, out)
        scales = stacked.scales.to(dy.dtype)
        dx = base_gradient(ctx, grad, dy) if ctx.needs_input_grad[0] else None  # (N, in), not shared with anything
        for (jobs, tokens), inner in zip(ctx.segments, inners, strict=True):
            n = jobs.stop - jobs.start
            part = dy[tokens].unflatten(0, (n, -1))  # (n, T, out)
            u = torch.bmm(part, b[jobs].mT).mul_(scales[jobs])  # (n, T, R)
            _add_product_(stacked.da[jobs], u.mT, rows[tokens].unflatten(0, (n, -1)))
            _add_product_(stacked.db[jobs], inner.mT, part)
            if dx is None:
                continue
            own = dx[tokens].unflatten(0, (n, -1))
            if mask is None:
                _add_product_(own, u, a[jobs])
            else:
                own += torch.bmm(u, a[jobs]) * mask[tokens].unflatten(0, (n, -1))
        return (None if dx is None else dx.view(ctx.x_shape).to(ctx.x_dtype)), None, None, None, None, None


def _add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left right, batched, inside the product where the dtypes are alike."""
    if total.dtype == left.dtype == right.dtype:
        total.baddbmm_(left, right)
    else:
        total += torch.bmm(left, right)


class StackRow:
    """AdamW on one job's row of a stack, as an optimizer of base/train.py; the state on disk is that of `AdamW` alone."""

    def __init__(
        self, stack: AdapterStack, name: str, solo: str, *, betas: tuple[float, float], eps: float, weight_decay: float
    ) -> None:
        self.stack, self.name, self.solo = stack, name, solo  # solo: the adapter's name where it is alone
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay

    @property
    def row(self) -> int:
        """The job's place in the stack, which changes as others leave."""
        return self.stack.names.index(self.name)

    def buffer(self, kind: str) -> Tensor:
        """The job's row of a buffer, (P,)."""
        return self.stack.buffers[kind][self.row]

    def _tensors(self, kind: str) -> list[tuple[str, Tensor]]:
        """(name in a solo run's checkpoint, view) of the job's matrices in a buffer."""
        key = module_key(self.solo)
        return [
            (f"{path}.adapters.{key}.{side}", tensor)
            for path, pair in self.stack.views(kind, self.name).items()
            for side, tensor in zip(("lora_a", "lora_b"), pair, strict=True)
        ]

    @property
    def named(self) -> list[tuple[str, Tensor]]:
        """The job's parameters under the names that they have in a solo run."""
        return self._tensors("weights")

    def step(self, learning_rate: float | None = None) -> None:
        """One update in place of the job's row, from its gradients."""
        assert learning_rate is not None
        self.stack.update_row(self.row, learning_rate, *self.betas, self.eps, self.weight_decay)

    def zero_grad(self) -> None:
        """Set the row's gradients to zero, also where they were NaN."""
        self.stack.zero_row(self.row)

    def state_tensors(self) -> dict[str, Tensor]:
        """Everything that resume needs, by the names of a solo run."""
        moments = [self._tensors(kind) for kind in ("exp_avgs", "exp_avg_sqs")]
        state = {"n_steps": torch.full((len(moments[0]),), self.stack.n_updates[self.row])}
        for (name, exp_avg), (_, exp_avg_sq) in zip(*moments, strict=True):
            state[f"{name}.exp_avg"], state[f"{name}.exp_avg_sq"] = exp_avg, exp_avg_sq
        return state

    def load_state_tensors(self, state: Any) -> None:
        """Put back what `state_tensors` gave. Raises ValueError when a parameter is missing or has another shape."""
        moments = {kind: self._tensors(kind) for kind in ("exp_avgs", "exp_avg_sqs")}
        steps = set(read_steps(state.get("n_steps"), len(moments["exp_avgs"])))
        if len(steps) != 1:
            raise ValueError(f"optimizer state n_steps: {sorted(steps)} differ; resume this run alone, with graft sft")
        self.stack.n_updates[self.row] = steps.pop()
        for kind, tensors in moments.items():
            for name, target in tensors:
                key = f"{name}.{kind[:-1]}"
                saved = state.get(key)
                if saved is None or saved.shape != target.shape:
                    found = "nothing" if saved is None else tuple(saved.shape)
                    raise ValueError(
                        f"optimizer state {key}: {found} saved, {tuple(target.shape)} due; "
                        "resume with the config that the run was started with"
                    )
                target.copy_(saved)
