"""One real step, watched: the functions that training and generation call, on real tensors or on fake ones."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ...base.dtypes import dtype_named
from ...base.loss import n_labels, next_token_loss
from ...base.model.config import ModelConfig
from ...base.model.kv_cache import KVCache
from ...base.model.transformer import Transformer
from ...base.optim.average import Averaged
from ...base.optim.soap import SOAP
from ...base.precision import LossScaler
from ...base.run import TrainConfig
from ...base.training.optimizers import Optimizer
from ...base.training.step import one_step
from ...quant.linear import quantize_linears_
from ..adapters.attach import attach_adapter
from ..optimizers import trained_optimizer
from .count import LiveBytes
from .settings import MemorySettings
from .shapes import ShapeTensor


class Work(Protocol):
    """What a step computes where it is not the next token's loss; finetune/align/step_memory.py has alignment's."""

    def attach(self, model: Transformer, /) -> None:
        """Add to the model what trains, or is held, beside its own weights."""
        ...

    def micro_batch(self, config: ModelConfig, rows: int, seq_len: int) -> dict[str, Tensor]:
        """Real tensors on the CPU, as the data pipeline leaves them, with every token but a sequence's first in the loss."""
        ...

    def rollout_rows(self, rows: int) -> int:
        """Answers that are sampled together before the step; 0: none."""
        ...

    def loss(self, model: nn.Module, batch: Mapping[str, Tensor], /) -> Any:
        """As base/train.py's Objective."""
        ...

    def n_labels(self, batch: Mapping[str, Tensor], /) -> int:
        """As base/train.py's Objective."""
        ...


def shaped_model(
    config: ModelConfig, settings: MemorySettings, work: Work | None = None, *, bare: bool = False
) -> Transformer:
    """The model as the method trains it, of ShapeTensors: every dtype and shape, no memory. `bare`: frozen, without adapters."""
    with LiveBytes(shapes=True):
        model = _as_trained(config, settings, bare)
        if work is not None:
            work.attach(model)
    return model


def _as_trained(config: ModelConfig, settings: MemorySettings, bare: bool) -> Transformer:
    model = Transformer(config)
    if settings.method == "full":
        return model
    dtype = dtype_named(settings.dtype)
    replace_tensors_(model, lambda tensor: tensor.to(dtype))
    if settings.method == "qlora":
        quantize_linears_(model, double_quant=settings.double_quant)
    if settings.method in ("lora", "qlora") and not bare:
        attach_adapter(model, settings.adapter, shapes_only=True)
    else:
        model.requires_grad_(False)
    return model


def place_(model: nn.Module, device: torch.device | str) -> None:
    """Give a model's ShapeTensors memory, with small random values: memory does not depend on them, but the step has to stay
    finite. Other tensors are left alone."""

    def random(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, ShapeTensor):
            return tensor
        fresh = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
        return fresh.normal_(0.0, 0.02) if fresh.is_floating_point() else fresh.random_(0, 256)

    replace_tensors_(model, random)


@torch.no_grad()
def replace_tensors_(model: nn.Module, make: Callable[[Tensor], Tensor]) -> None:
    """Put make(tensor) in the place of each parameter and buffer; a tensor that two modules share stays shared."""
    made: dict[int, tuple[Tensor, Tensor]] = {}  # id of the old one -> old (so that no other gets its id) and new
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, old in tensors.items():
                if old is None:
                    continue
                if id(old) not in made:
                    new = make(old)
                    is_parameter = isinstance(old, nn.Parameter) and new is not old
                    made[id(old)] = old, nn.Parameter(new, old.requires_grad) if is_parameter else new
                tensors[name] = made[id(old)][1]  # pyright: ignore[reportArgumentType]


def make_optimizer(model: nn.Module, settings: MemorySettings) -> Optimizer:
    """The optimizer that the setting names, over what trains. SOAP's is one whose next update refreshes its bases: its largest."""
    lora = settings.adapter if settings.method in ("lora", "qlora") else None
    config = TrainConfig(optimizer=settings.optimizer, soap_every=1, ema_decay=0.5 if settings.averages else 0.0)
    optimizer = trained_optimizer(model, config, lora=lora)
    soap = optimizer.inner if isinstance(optimizer, Averaged) else optimizer
    if isinstance(soap, SOAP):
        soap.steps = [1] * len(soap.steps)
    return optimizer


def token_batch(config: ModelConfig, rows: int, seq_len: int) -> dict[str, Tensor]:
    """A micro-batch in which every position carries loss, on the CPU as the data pipeline leaves it."""
    ids = torch.zeros(rows, seq_len, dtype=torch.int64)
    return {"ids": ids, "targets": torch.zeros_like(ids)}


def make_micro_batches(
    config: ModelConfig, settings: MemorySettings, work: Work | None = None
) -> list[dict[str, Tensor]]:
    """Of one step: from the second micro-batch on each is like the one before, so two stand for any number."""
    make = token_batch if work is None else work.micro_batch
    n = min(-(-settings.batch_size // settings.rows), 2)
    return [make(config, settings.rows, settings.seq_len) for _ in range(n)]


def run_training_step(
    model: Transformer,
    optimizer: Optimizer,
    settings: MemorySettings,
    device: str,
    *,
    counter: LiveBytes | None = None,
    work: Work | None = None,
    micro_batches: Sequence[Mapping[str, Tensor]] | None = None,  # None: `make_micro_batches`
) -> None:
    """base/train.py's own step on one batch; the counter, if any, is told where the step stands."""
    model.train()
    model.checkpointing, model.recompute_layers = settings.checkpointing, settings.recompute_layers
    if micro_batches is None:
        micro_batches = make_micro_batches(model.config, settings, work)
    loss, count = (next_token_loss, n_labels) if work is None else (work.loss, work.n_labels)
    rows = settings.rows
    config = TrainConfig(
        steps=10, batch_size=settings.batch_size, micro_batch=rows, dtype=settings.dtype, warmup_steps=0
    )
    scaler = LossScaler(settings.dtype, scale=1.0)
    if counter is None:
        one_step(model, optimizer, micro_batches, config, scaler, 0, loss, count, device)
        return
    with watched(model, counter):
        marked = MarkedOptimizer(optimizer, counter)
        one_step(model, marked, micro_batches, config, scaler, 0, _marked_loss(loss, counter), count, device)


@torch.no_grad()
def run_generation(
    model: Transformer, settings: MemorySettings, device: str, *, counter: LiveBytes | None = None
) -> KVCache:
    """Read a prompt of seq_len - 1 tokens and choose the next; decoding then needs less at a time. Returns the cache."""
    model.eval()
    ids = torch.zeros(settings.batch_size, settings.seq_len - 1, dtype=torch.int64, device=device)
    cache = model.new_cache(settings.batch_size, settings.seq_len)
    if counter is not None:
        counter.add([t for layer in cache.layers for t in layer.tensors()], "cache")
    last = torch.full((settings.batch_size,), settings.seq_len - 2, dtype=torch.int64, device=device)
    model(ids, cache=cache, logits_at=last).argmax(-1)
    return cache


@torch.no_grad()
def run_decoding(
    model: Transformer, settings: MemorySettings, device: str, rows: int, *, counter: LiveBytes | None = None
) -> KVCache:
    """The last token of `rows` answers of seq_len tokens, as the engine decodes them together. Returns the cache."""
    model.eval()
    cache = model.new_cache(rows, settings.seq_len)
    if counter is not None:
        counter.add([t for layer in cache.layers for t in layer.tensors()], "cache")
    model(torch.zeros(rows, 1, dtype=torch.int64, device=device), cache=cache)[:, 0].float().log_softmax(-1)
    return cache


def _marked_loss(
    loss: Callable[[nn.Module, Mapping[str, Tensor]], Any], counter: LiveBytes
) -> Callable[[nn.Module, Mapping[str, Tensor]], Any]:
    def marked(model: nn.Module, batch: Mapping[str, Tensor]) -> Any:
        counter.enter("forward", "embedding", "activations")
        value = loss(model, batch)
        counter.enter("backward", "loss", "temporaries")
        return value

    return marked


class MarkedOptimizer:
    """An optimizer that tells the counter when its update begins."""

    def __init__(self, optimizer: Optimizer, counter: LiveBytes) -> None:
        self.named = optimizer.named
        self._optimizer, self._counter = optimizer, counter

    def step(self, learning_rate: float | None = None) -> None:
        self._counter.enter("update", "", "temporaries")
        self._optimizer.step(learning_rate)

    def zero_grad(self) -> None:
        self._optimizer.zero_grad()

    def state_tensors(self) -> dict[str, Tensor]:
        return self._optimizer.state_tensors()

    def load_state_tensors(self, state: Mapping[str, Tensor]) -> None:
        self._optimizer.load_state_tensors(state)


@contextmanager
def watched(model: Transformer, counter: LiveBytes) -> Iterator[None]:
    """Within the block the counter knows which layer runs forward or backward, and which tensors became gradients."""
    n = len(model.model.layers)
    handles = []

    def before(i: int) -> Callable[[nn.Module, object], None]:
        def hook(module: nn.Module, inputs: object) -> None:
            if counter.place[0] == "forward":  # else it is checkpointing's recomputation
                counter.enter("forward", i, "activations")

        return hook

    def after(i: int | str) -> Callable[[nn.Module, object, Tensor], None]:
        def hook(module: nn.Module, inputs: object, output: Tensor) -> None:
            if counter.place[0] != "forward":
                return
            if output.requires_grad:
                output.register_hook(lambda _: counter.enter("backward", i, "temporaries"))
            if i == n - 1:
                counter.enter("forward", "loss", "loss")

        return hook

    handles.append(model.model.embed_tokens.register_forward_hook(after("embedding")))
    for i, layer in enumerate(model.model.layers):
        handles += [layer.register_forward_pre_hook(before(i)), layer.register_forward_hook(after(i))]
    for parameter in model.parameters():
        if parameter.requires_grad:
            handles.append(parameter.register_post_accumulate_grad_hook(lambda p: counter.add([p.grad], "gradients")))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
