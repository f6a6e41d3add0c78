"""Multi-token prediction: further tokens, each predicted in training by a layer of its own (DeepSeek-V3, arXiv:2412.19437, section
2.2). It makes the loss denser and plans ahead; generating doesn't use it.

    h^0_i          the last layer's output at token i, before the final norm
    h^k_i          layer_k(eh_proj [enorm(embedding of token i + k), hnorm(h^(k-1)_i)])        (eq. 21-22)
    token i+1+k    head(norm_k(h^k_i)), with the model's own head                               (eq. 23)

The embedding comes first in the pair, as in the published weights. Rows keep their length: a token whose (i + k)-th or next one
lies past its document's end has no loss, and as the last ones of it they are seen by no other.
"""

import re
from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from .config import ModelConfig
from .kv_cache import StepContext
from .norm import norm

OWN = re.compile(r"mtp\.(\d+)\.(?:layer\.)?(.*)")  # below Transformer
DEEPSEEK = re.compile(r"model\.layers\.(\d+)\..*")


class Predictor(nn.Module):
    """One further token: (B, T, D) hidden states and (B, T, D) embeddings of the tokens in between -> (B, T, D)."""

    ROLES: ClassVar = {"eh_proj.weight": "hidden"}

    def __init__(self, config: ModelConfig, layer: nn.Module) -> None:
        super().__init__()
        self.enorm, self.hnorm = norm(config, config.d_model), norm(config, config.d_model)
        self.eh_proj = nn.Linear(2 * config.d_model, config.d_model, bias=False)
        self.layer = layer
        self.norm = norm(config, config.d_model)

    def forward(self, hidden: Tensor, embedded: Tensor, context: StepContext) -> Tensor:
        """The next hidden states, before `norm`."""
        return self.layer(self.eh_proj(torch.cat([self.enorm(embedded), self.hnorm(hidden)], -1)), context, None)


def later(
    tokens: Tensor,  # (B, T) int64
    k: int,
    *,
    fill: int,  # where there is no such token
    cu_seqlens: Tensor | None = None,  # of documents packed in one row, whose ends no token looks past
) -> Tensor:
    """tokens[b, t + k] at [b, t], (B, T)."""
    T = tokens.shape[1]
    at = torch.arange(T, device=tokens.device) + k
    end = torch.full_like(at, T)
    if cu_seqlens is not None:
        ends = cu_seqlens[1:].to(at.dtype)
        document = torch.bucketize(at - k, ends, right=True).clamp(max=len(ends) - 1)
        end = ends[document]
    return torch.where(at < end, tokens[:, at.clamp(max=T - 1)], fill)


def further_losses(
    predictors: nn.ModuleList,
    hidden: Tensor,  # (B, T, D), before the final norm
    ids: Tensor,  # (B, T) int64
    targets: Tensor,  # (B, T) int64, already shifted by one
    *,
    context: StepContext,
    embed: Callable[[Tensor], Tensor],
    loss: Callable[[Tensor, Tensor], Tensor],  # hidden (N, D) after a norm, targets (N,) -> summed nats
    run: Callable[..., Tensor],  # a module and its arguments -> its output
    ignore_index: int,
) -> Tensor:
    """The mean over predictors of their losses, each summed over its tokens in nats, () float32 (eq. 24-25, without lambda)."""
    total = hidden.new_zeros((), dtype=torch.float32)
    for k, predictor in enumerate(predictors, 1):
        hidden = run(predictor, hidden, embed(later(ids, k, fill=0, cu_seqlens=context.cu_seqlens)), context)
        wanted = later(targets, k, fill=ignore_index, cu_seqlens=context.cu_seqlens)
        normed: Tensor = predictor.norm(hidden)  # pyright: ignore[reportCallIssue, reportAssignmentType]
        total = total + loss(normed.flatten(0, 1), wanted.flatten())
    return total / len(predictors)


def exported(tensors: Mapping[str, Tensor], config: ModelConfig, *, deepseek: bool) -> dict[str, Tensor]:
    """A state dict with the predictors under DeepSeek-V3's names, as layers after the last one; without them for any other
    layout, which has no names for them. The embedding and head that those files repeat in each are not repeated."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        own = OWN.fullmatch(name)
        if own is None:
            found[name] = tensor
        elif deepseek:
            rest = "shared_head.norm.weight" if own[2] == "norm.weight" else own[2]
            found[f"model.layers.{config.n_layers + int(own[1])}.{rest}"] = tensor
    return found


def export_figures(model: nn.Module, *, deepseek: bool) -> dict[str, int]:
    """What became of the predictors' weights in the folder of a trained model, for its summary; {} without them."""
    n = sum(p.numel() for name, p in model.named_parameters() if OWN.fullmatch(name))
    return {f"n_predictor_weights_{'saved' if deepseek else 'left_out'}": n} if n else {}


def is_of_predictor(name: str, config: ModelConfig) -> bool:
    """Whether a file's weight is a predictor's, which no loaded model has: DeepSeek's are layers past the last one."""
    layer = DEEPSEEK.fullmatch(name)
    return config.d_latent is not None and layer is not None and int(layer[1]) >= config.n_layers
