"""Other libraries' models for bench/pretrain.py: litgpt's with the same weights, and nanochat's of equal size."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graft.base.model.transformer import Transformer


def has_litgpt() -> bool:
    """`pip install litgpt`."""
    return find_spec("litgpt") is not None


def litgpt_of(model: Transformer) -> tuple[nn.Module, Callable[[nn.Module, Tensor, Tensor], Tensor]]:
    """litgpt's GPT with the same weights, and its pretraining loss (litgpt/pretrain.py: chunks of 128 rows of logits)."""
    from litgpt.config import Config
    from litgpt.model import GPT
    from litgpt.utils import chunked_cross_entropy

    c = model.config
    config = Config(
        name="peer", block_size=c.max_seq_len, vocab_size=c.vocab_size, padded_vocab_size=c.vocab_size, n_layer=c.n_layers,
        n_head=c.n_heads, n_query_groups=c.n_kv_heads, n_embd=c.d_model, head_size=c.d_head, rotary_percentage=1.0,
        parallel_residual=False, bias=False, norm_class_name="RMSNorm", norm_eps=c.norm_eps, mlp_class_name="LLaMAMLP",
        intermediate_size=c.d_ff, rope_base=int(c.rope_theta),
    )  # fmt: skip
    peer = GPT(config)
    peer.lm_head.weight = peer.transformer.wte.weight
    weights: dict[str, Tensor] = {"transformer.wte.weight": model.model.embed_tokens.weight}
    weights |= {"transformer.ln_f.weight": model.model.norm.weight, "lm_head.weight": model.lm_head.weight}
    for i, layer in enumerate(model.model.layers):
        mixer, mlp = layer.self_attn, layer.mlp
        weights |= {
            f"transformer.h.{i}.{name}.weight": tensor
            for name, tensor in {
                "norm_1": layer.input_layernorm.weight,
                "attn.qkv": torch.cat([mixer.q_proj.weight, mixer.k_proj.weight, mixer.v_proj.weight]),
                "attn.proj": mixer.o_proj.weight,
                "norm_2": layer.post_attention_layernorm.weight,
                "mlp.fc_1": mlp.gate_proj.weight,
                "mlp.fc_2": mlp.up_proj.weight,
                "mlp.proj": mlp.down_proj.weight,
            }.items()
        }
    peer.load_state_dict(weights)
    return peer.train(), lambda run, ids, targets: chunked_cross_entropy(run(ids), targets)


class Nanochat(nn.Module):
    """nanochat's model (karpathy/nanochat, nanochat/gpt.py, 2025) written anew at a given size: norms without weights, also of
    the embeddings, RoPE then QK-norm, relu^2 without a gate, an untied head under a soft cap of 15."""

    def __init__(
        self, vocab_size: int, d_model: int, n_layers: int, n_heads: int, n_kv_heads: int, seq_len: int
    ) -> None:
        super().__init__()
        self.heads, self.d_head = (n_heads, n_kv_heads, n_kv_heads), d_model // n_heads
        self.embed, self.head = nn.Embedding(vocab_size, d_model), nn.Linear(d_model, vocab_size, bias=False)

        def linear(n_in: int, n_out: int) -> nn.Linear:
            return nn.Linear(n_in, n_out, bias=False)

        self.layers: Any = nn.ModuleList(
            nn.ModuleDict(
                {
                    "qkv": nn.ModuleList(linear(d_model, n * self.d_head) for n in self.heads),
                    "o": linear(d_model, d_model),
                    "up": linear(d_model, 4 * d_model),
                    "down": linear(4 * d_model, d_model),
                }
            )
            for _ in range(n_layers)
        )
        angles = torch.arange(seq_len)[:, None] * 10_000.0 ** (-torch.arange(0, self.d_head, 2) / self.d_head)
        self.register_buffer("cos", angles.cos()[None, :, None], persistent=False)  # (1, T, 1, Dh/2)
        self.register_buffer("sin", angles.sin()[None, :, None], persistent=False)

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Mean cross entropy, ()."""
        x = _normed(self.embed(ids))
        for layer in self.layers:
            x = x + layer["o"](self._attend(layer["qkv"], _normed(x)))
            x = x + layer["down"](F.relu(layer["up"](_normed(x))).square())
        logits = 15 * torch.tanh(self.head(_normed(x)).float() / 15)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)

    def _attend(self, projections: Any, x: Tensor) -> Tensor:
        B, T, D = x.shape
        q, k, v = (p(x).view(B, T, n, self.d_head) for p, n in zip(projections, self.heads, strict=True))
        q, k, v = (t.transpose(1, 2) for t in (_normed(self._turned(q)), _normed(self._turned(k)), v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).reshape(B, T, D)

    def _turned(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        cos, sin = self.cos[:, : x.shape[1]], self.sin[:, : x.shape[1]]
        return torch.cat([a * cos + b * sin, b * cos - a * sin], -1)


def _normed(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:])


def nanochat_like(model: Transformer) -> Nanochat:
    """Of the same sizes: 4 D relu^2 has as many weights as a gated 8/3 D; its head is a second matrix."""
    c = model.config
    torch.manual_seed(0)
    return Nanochat(c.vocab_size, c.d_model, c.n_layers, c.n_heads, c.n_kv_heads, c.max_seq_len).train()
