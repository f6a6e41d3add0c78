"""The decoder: embed -> n_layers x (attention, feed-forward) -> norm -> lm_head.

Axes: B batch, T query positions, D model, V vocabulary. Module paths are the keys in a Hugging Face checkpoint, so a
state dict is the file's.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.cross_entropy import linear_cross_entropy
from ...kernels.decode import add_rms_norm_, can_run
from . import init
from .add_norm import AddNormLayer
from .attention import Attention
from .config import LayerSpec, ModelConfig
from .delta_net import GatedDeltaNet
from .experts import feed_forward
from .head import CappedHead, TakesLoss, summed_loss
from .kv_cache import KVCache, LayerCache, StepContext
from .latent_attention import LatentAttention
from .multi_token import Predictor, further_losses
from .norm import norm
from .paged_cache import PAGE, PagedKVCache, PagedLayer, PagePool
from .positions import POSITIONS
from .recompute import recompute
from .rope import angle_tables
from .router_losses import RouterLosses
from .sandwich import SandwichLayer
from .state_cache import NO_WAY_BACK

IGNORE = -100  # a target with this id carries no loss


class DecoderLayer(nn.Module):
    """x + attention(norm(x)), then + feed_forward(norm(.)): pre-norm (Xiong et al. 2020, arXiv:2002.04745)."""

    def __init__(self, config: ModelConfig, spec: LayerSpec) -> None:
        super().__init__()
        self.input_layernorm = norm(config, config.d_model)
        if spec.attention == "linear":
            self.linear_attn = GatedDeltaNet(config)
        else:
            self.self_attn = self_attention(config, spec)
        self.post_attention_layernorm = norm(config, config.d_model)
        self.mlp = feed_forward(config, spec)

    def forward(self, x: Tensor, context: StepContext, cache: LayerCache | PagedLayer | None = None) -> Tensor:
        mixed = mixer_of(self)(self.input_layernorm(x), context, cache)
        normed, x = self.post_attention_layernorm.add(mixed, x)
        return x + self.mlp(normed, context)

    def decode(self, pending: Tensor | None, stream: Tensor, context: StepContext, cache: LayerCache) -> Tensor:
        """`forward` for one new token a row in few operators. `stream` (B, D) is the residual stream, changed in place;
        `pending` the last layer's output that is still to be added to it. Returns this layer's own."""
        before = self.input_layernorm
        mixed = mixer_of(self).decode(add_rms_norm_(pending, stream, before.gain, before.eps), cache, context)
        before = self.post_attention_layernorm
        return self.mlp.decode(add_rms_norm_(mixed, stream, before.gain, before.eps))


def mixer_of(layer: nn.Module) -> Any:
    """What mixes a layer's tokens: attention, or linear attention under its own name on disk."""
    return layer._modules.get("linear_attn") or layer._modules["self_attn"]


def self_attention(config: ModelConfig, spec: LayerSpec) -> Attention | LatentAttention:
    """The layer's attention."""
    return LatentAttention(config, spec) if spec.attention == "latent" else Attention(config, spec)


class PostNormLayer(nn.Module):
    """x + norm(attention(x)), then + norm(feed_forward(.)): norms inside the branches (OLMo 2, arXiv:2501.00656, section 3.2)."""

    def __init__(self, config: ModelConfig, spec: LayerSpec) -> None:
        super().__init__()
        self.self_attn = Attention(config, spec)
        self.post_attention_layernorm = norm(config, config.d_model)
        self.mlp = feed_forward(config, spec)
        self.post_feedforward_layernorm = norm(config, config.d_model)

    def forward(self, x: Tensor, context: StepContext, cache: LayerCache | None = None) -> Tensor:
        x = x + self.post_attention_layernorm(self.self_attn(x, context, cache))
        return x + self.post_feedforward_layernorm(self.mlp(x, context))

    def decode(self, pending: Tensor | None, stream: Tensor, context: StepContext, cache: LayerCache) -> Tensor:
        """`forward` for one new token a row; see DecoderLayer.decode."""
        if pending is not None:
            stream += pending
        stream += self.post_attention_layernorm(self.self_attn.decode(stream, cache, context))
        return self.post_feedforward_layernorm(self.mlp.decode(stream))


Layer = DecoderLayer | PostNormLayer | SandwichLayer | AddNormLayer
LAYERS: dict[str, type[Layer]] = {
    "pre": DecoderLayer,
    "post": PostNormLayer,
    "sandwich": SandwichLayer,
    "add": AddNormLayer,
}


def decoder_layer(config: ModelConfig, spec: LayerSpec) -> Layer:
    """One layer, as its spec says."""
    return LAYERS[spec.norm](config, spec)


class Layers(Protocol):
    """What a ModuleList of layers offers."""

    def __iter__(self) -> Iterator[Layer]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, i: int) -> Layer: ...


class Decoder(nn.Module):
    """Everything below the output projection: ids -> hidden states after the final norm."""

    ROLES: ClassVar = {"embed_tokens.weight": "embedding"}

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.layers: Layers = nn.ModuleList(decoder_layer(config, config.layer(i)) for i in range(config.n_layers))  # pyright: ignore
        if config.positions != "rope":
            self.embed_positions = POSITIONS[config.positions](config)
        self.norm: Any = nn.Identity() if config.add_norm else norm(config, config.d_model)


class SharedRows(Protocol):
    """Ranks that have some positions of each row (base/parallel/context.py)."""

    def positions(self, T: int, *, device: torch.device) -> Tensor:
        """Where this rank's T positions lie in the row, (T,) int64."""
        ...

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        window: int | None = None,
        cu_seqlens: Tensor | None = None,
        scale: float | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        """kernels.attention of this rank's queries over the keys of the whole row."""
        ...


class Transformer(nn.Module):
    """A causal language model. `checkpointing` recomputes each layer in the backward pass instead of keeping it."""

    ROLES: ClassVar = {"lm_head.weight": "head"}

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpointing = False
        self.recompute_layers: int | None = None  # how many, the first ones; None: all
        self.compiled: Callable[..., Tensor] | None = None  # of hidden_states, in training (base/training/compiled.py)
        self.fingerprint: str | None = None  # of the files it was loaded from; see huggingface.fingerprint
        # What gives each row of a batch its own adapter, if anything does: names -> a block to run the model in.
        self.row_selector: Callable[[Sequence[str | None]], AbstractContextManager[object]] | None = None
        # A hash of an adapter's weights by its name; None: they may change, so nothing computed with them may be kept.
        self.adapter_content: Callable[[str], str | None] | None = None
        self.shared_rows: SharedRows | None = None  # None: this process has whole rows
        self.fused_decoding = True  # False while something wraps a norm, whose weight the short way would read past it
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        if config.n_predict:
            last = config.layer(config.n_layers - 1)
            self.mtp = nn.ModuleList(Predictor(config, decoder_layer(config, last)) for _ in range(config.n_predict))

    def forward(
        self,
        ids: Tensor,  # (B, T) int64
        targets: Tensor | None = None,  # (B, T) int64, already shifted; -100: no loss there
        *,
        positions: Tensor | None = None,  # (B, T) int64; default: 0..T-1, or the cache's next ones
        cu_seqlens: Tensor | None = None,  # (n_docs + 1,) int32 with B = 1: documents packed in one row
        cache: KVCache | PagedKVCache | None = None,  # is advanced by T
        logits_at: Tensor | None = None,  # (B,) int64: only this position's logits of each row
    ) -> Tensor:
        """Logits (B, T, V): [b, t] scores the token after ids[b, t]; (B, 1, V) with `logits_at`.

        With targets: the cross entropy in nats, summed over the targets that are not -100, () float32. The logits are then
        never held whole (kernels/cross_entropy). In training the mean of the routers' losses, where there are any, is added
        once for each of these targets, and predict_loss times the loss of further tokens, where n_predict asks for it.
        """
        if targets is not None and self.training and self.config.n_predict and cache is None:
            return self._loss_of_several(ids, targets, positions, cu_seqlens)
        router_losses = RouterLosses() if targets is not None and self.training else None
        compiled = self.compiled if self.training and cache is None and torch.is_grad_enabled() else None
        hidden = (compiled or self.hidden_states)(
            ids, positions=positions, cu_seqlens=cu_seqlens, cache=cache, router_losses=router_losses
        )
        if targets is not None:
            loss = self.summed_loss(hidden.flatten(0, 1), targets.flatten())
            if router_losses:  # each is a mean over tokens, so that it weighs as much as the mean cross entropy
                loss = loss + (targets != IGNORE).sum() * router_losses.mean()
            return loss
        if logits_at is not None:
            hidden = hidden[torch.arange(hidden.shape[0], device=hidden.device), logits_at][:, None]  # (B, 1, D)
        return self.head(hidden)

    @property
    def head(self) -> "nn.Module | CappedHead":
        """What turns hidden states into logits: lm_head, or lm_head under the config's soft cap."""
        cap = self.config.logit_softcap
        return self.lm_head if cap is None else CappedHead(self.lm_head, cap)

    def embed(self, ids: Tensor, positions: Tensor | None = None) -> Tensor:
        """ids (B, T) and, where they are added, positions (B or 1, T) -> the first layer's input (B, T, D)."""
        x = self.model.embed_tokens(ids)
        if self.config.scale_embeddings:
            x = x * x.new_full((), self.config.d_model**0.5)  # rounded to the weights' dtype, as Gemma was trained
        return x if positions is None else x + self.model.embed_positions(positions, x.dtype)

    def hidden_states(
        self,
        ids: Tensor,  # (B, T) int64
        *,
        positions: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cache: KVCache | PagedKVCache | None = None,
        router_losses: RouterLosses | None = None,  # a training mixture of experts adds its router's, () float32 each
    ) -> Tensor:
        """The final norm's output (B, T, D), which lm_head turns into logits."""
        B, T = ids.shape
        context = (
            cache.begin(B, T)
            if cache is not None
            else self.context(ids, positions, cu_seqlens, router_losses=router_losses)
        )
        x = self.embed(ids, context.positions)  # (B, T, D)
        if isinstance(cache, KVCache) and context.start and T == 1 and self.decodes_short and can_run(x):
            return self._decode(x[:, 0], context, cache)
        x = self._through_layers(x, context, cache)
        if cache is not None:
            cache.advance(T)
        return self.model.norm(x)

    def _through_layers(self, x: Tensor, context: StepContext, cache: KVCache | PagedKVCache | None) -> Tensor:
        """The first layer's input (B, T, D) -> the last one's output, before the final norm."""
        # The first ones are recomputed: when the backward pass is there, what later layers kept is freed.
        n_recomputed = len(self.model.layers) if self.recompute_layers is None else self.recompute_layers
        for i, layer in enumerate(self.model.layers):
            if cache is None and i < n_recomputed:
                x = self.run(layer, x, context, None)
            else:
                x = layer(x, context, None if cache is None else cache.layers[i])
        return x

    def run(self, module: Callable[..., Tensor], *args: Any) -> Tensor:
        """module(*args), recomputed in the backward pass where `checkpointing` asks for it."""
        return recompute(module, *args) if self.checkpointing and self.training else module(*args)

    def _loss_of_several(
        self, ids: Tensor, targets: Tensor, positions: Tensor | None, cu_seqlens: Tensor | None
    ) -> Tensor:
        """`forward`'s loss in training with n_predict > 0, () float32."""
        context = self.context(ids, positions, cu_seqlens, router_losses=RouterLosses())
        x = self._through_layers(self.embed(ids, context.positions), context, None)
        loss = self.summed_loss(self.model.norm(x).flatten(0, 1), targets.flatten())
        further = further_losses(
            self.mtp, x, ids, targets, context=context, embed=self.embed, loss=self.summed_loss, run=self.run,
            ignore_index=IGNORE,
        )  # fmt: skip
        loss = loss + self.config.predict_loss * further
        if context.router_losses:
            loss = loss + (targets != IGNORE).sum() * context.router_losses.mean()
        return loss

    def context(
        self,
        x: Tensor,  # ids (B, T), or hidden states (B, T, D) of a later pipeline stage
        positions: Tensor | None = None,  # (B, T) int64
        cu_seqlens: Tensor | None = None,
        *,
        router_losses: RouterLosses | None = None,
    ) -> StepContext:
        """What the layers share where there is no cache."""
        shared = self.shared_rows
        if positions is None:
            T, device = x.shape[1], x.device
            own = torch.arange(T, device=device) if shared is None else shared.positions(T, device=device)
            positions = own[None]  # (1, T)
        return StepContext(
            **angle_tables(self.config, positions),
            cu_seqlens=cu_seqlens,
            router_losses=router_losses,
            attend=None if shared is None else shared.attend,
        )

    @property
    def decodes_short(self) -> bool:
        """Whether one new token a row may go through kernels/decode."""
        return self.fused_decoding and self.config.decodes_short

    def _decode(self, stream: Tensor, context: StepContext, cache: KVCache) -> Tensor:
        """The layers and the final norm for one new token a row, (B, D) -> (B, 1, D)."""
        pending = None
        angles = {name: getattr(context, name) for name in cache.angles}
        context = context._replace(
            **{name: table[:, 0].contiguous() for name, table in angles.items()}
        )  # (B or 1, Dh/2)
        for layer, layer_cache in zip(self.model.layers, cache.layers, strict=True):
            pending = layer.decode(pending, stream, context, layer_cache)
        cache.advance(1)
        return add_rms_norm_(pending, stream, self.model.norm.gain, self.model.norm.eps)[:, None]

    def summed_loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Summed cross entropy in nats of hidden (N, D) and targets (N,), () float32."""
        if type(self.head) is nn.Linear:
            return linear_cross_entropy(hidden, self.lm_head.weight, targets, ignore_index=IGNORE, reduction="sum")
        if isinstance(self.lm_head, TakesLoss):
            return self.lm_head.summed_loss(hidden, targets)
        # An adapted, quantized or capped head is a function, not a matrix; the loss itself is taken in float32.
        if isinstance(self.head, CappedHead):
            return summed_loss(self.head, hidden, targets, ignore_index=IGNORE)
        return F.cross_entropy(self.head(hidden).float(), targets, ignore_index=IGNORE, reduction="sum")

    def new_cache(self, n_rows: int, capacity: int) -> KVCache:
        """An empty cache for `n_rows` rows of up to `capacity` tokens (it grows when they are more).

        Each attention layer makes its own part, in the embedding's dtype and on its device.
        """
        weight = self.model.embed_tokens.weight
        layers = [
            mixer_of(layer).new_cache(n_rows, capacity, weight.dtype, weight.device) for layer in self.model.layers
        ]
        return KVCache(self.config, layers, n_rows, capacity)

    def new_pages(self, max_bytes: int) -> PagePool:
        """Pages for the keys and values of `PagedKVCache`s, of at most so many bytes in all."""
        weight = self.model.embed_tokens.weight
        if self.config.n_linear_layers:
            raise ValueError(f"the key-value cache can't be kept in pages: {NO_WAY_BACK}; leave cache_bytes out")
        one = sum(layer.self_attn.cache_width for layer in self.model.layers) * PAGE * weight.element_size()
        n = max_bytes // one
        if n < 2:
            raise ValueError(
                f"{max_bytes} bytes hold no page of {PAGE} tokens, which takes {one}; give at least {2 * one}"
            )
        return PagePool(
            [layer.self_attn.new_pages(n, PAGE, weight.dtype, weight.device) for layer in self.model.layers]
        )


def initialize_(model: Transformer, *, seed: int, width_ratio: float = 1.0) -> None:
    """Fill the weights in place by their roles (base/model/init.py). Depends on the seed only; width_ratio is muP's."""
    std, n_layers = model.config.init_std, model.config.n_layers
    init.initialize_(model, seed=seed, std=std, n_layers=n_layers, width_ratio=width_ratio)
