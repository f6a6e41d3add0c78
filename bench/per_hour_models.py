"""Two public recipes' models for bench/per_hour.py, written from their descriptions, with graft's call and summed loss.

    GPT2Shape       nanoGPT's: LayerNorm, learned positions, GELU of width 4 D, one head tied to the embedding, no biases
    NanochatShape   nanochat's of October 2025: RMSNorm without weights, RoPE, QK norm, ReLU^2 of width 4 D, an untied head of
                    zeros, logits capped at 15; its later additions (value embeddings, residual scalars, windows) are left out

Both take attention from torch's fused operator, as the originals do. `check_gpt2` compares the first with transformers.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CAP = 15.0  # nanochat's, of logits


class GPT2Shape(nn.Module):
    """ids, targets (B, T) -> summed cross entropy in nats, () float32."""

    def __init__(self, vocab_size: int, d_model: int, n_layers: int, n_heads: int, seq_len: int, seed: int) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab_size, d_model), nn.Embedding(seq_len, d_model)
        self.blocks = nn.ModuleList(GPT2Block(d_model, n_heads) for _ in range(n_layers))
        self.norm = nn.LayerNorm(d_model, bias=False)
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                std = 0.02 / math.sqrt(2 * n_layers) if name.endswith("out.weight") else 0.02
                nn.init.normal_(parameter, std=std, generator=generator)

    def logits(self, ids: Tensor) -> Tensor:
        """(B, T, V)."""
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.wte.weight)

    def forward(self, ids: Tensor, targets: Tensor, **rest: Any) -> Tensor:
        return F.cross_entropy(self.logits(ids).flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")


class GPT2Block(nn.Module):
    def __init__(self, d_model: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.ln_1, self.ln_2 = nn.LayerNorm(d_model, bias=False), nn.LayerNorm(d_model, bias=False)
        self.qkv, self.attn_out = nn.Linear(d_model, 3 * d_model, bias=False), nn.Linear(d_model, d_model, bias=False)
        self.fc, self.mlp_out = nn.Linear(d_model, 4 * d_model, bias=False), nn.Linear(4 * d_model, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (heads(part, self.n_heads) for part in self.qkv(self.ln_1(x)).chunk(3, dim=-1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn_out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp_out(F.gelu(self.fc(self.ln_2(x))))


class NanochatShape(nn.Module):
    """ids, targets (B, T) -> summed cross entropy in nats, () float32."""

    cos: Tensor
    sin: Tensor

    def __init__(self, vocab_size: int, d_model: int, n_layers: int, n_heads: int, seq_len: int, seed: int) -> None:
        super().__init__()
        self.wte = nn.Embedding(vocab_size, d_model)
        self.blocks = nn.ModuleList(NanochatBlock(d_model, n_heads) for _ in range(n_layers))
        self.head = nn.Linear(d_model, vocab_size, bias=False)
        d_head = d_model // n_heads
        angles = torch.outer(torch.arange(seq_len).float(), 10_000.0 ** (-torch.arange(0, d_head, 2).float() / d_head))
        self.register_buffer("cos", angles.cos(), persistent=False)  # (T, Dh / 2)
        self.register_buffer("sin", angles.sin(), persistent=False)
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            fan_out, fan_in = parameter.shape
            std = min(1.0, math.sqrt(fan_out / fan_in)) / math.sqrt(fan_in)  # Yang et al. 2023, arXiv:2310.17813
            if name.endswith("out.weight") or name == "head.weight":
                nn.init.zeros_(parameter)
            else:
                nn.init.normal_(parameter, std=1.0 if name == "wte.weight" else std, generator=generator)

    def forward(self, ids: Tensor, targets: Tensor, **rest: Any) -> Tensor:
        x = rms(self.wte(ids))
        for block in self.blocks:
            x = block(x, self.cos[: ids.shape[1]], self.sin[: ids.shape[1]])
        logits = CAP * torch.tanh(self.head(rms(x)) / CAP)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")


class NanochatBlock(nn.Module):
    def __init__(self, d_model: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.q, self.k, self.v, self.attn_out = (nn.Linear(d_model, d_model, bias=False) for _ in range(4))
        self.fc, self.mlp_out = nn.Linear(d_model, 4 * d_model, bias=False), nn.Linear(4 * d_model, d_model, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        normed = rms(x)
        q, k, v = (heads(linear(normed), self.n_heads) for linear in (self.q, self.k, self.v))
        q, k = rms(turned(q, cos, sin)), rms(turned(k, cos, sin))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn_out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp_out(F.relu(self.fc(rms(x))).square())


def heads(x: Tensor, n_heads: int) -> Tensor:
    """(B, T, H * Dh) -> (B, H, T, Dh)."""
    return x.unflatten(-1, (n_heads, -1)).transpose(1, 2)


def rms(x: Tensor) -> Tensor:
    """RMSNorm without a weight."""
    return F.rms_norm(x, (x.shape[-1],))


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on halves."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1)


def check_gpt2() -> None:
    """Raises AssertionError unless GPT2Shape's logits are those of transformers' GPT-2 with the same weights, to 1e-5."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2Shape(90, 32, 2, 4, 16, seed=0).eval()
    config = GPT2Config(
        vocab_size=90,
        n_positions=16,
        n_embd=32,
        n_layer=2,
        n_head=4,
        activation_function="gelu",
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    peer = GPT2LMHeadModel(config).eval()
    zeros = {name: torch.zeros_like(value) for name, value in peer.state_dict().items() if name.endswith(".bias")}
    given = {"transformer.wte.weight": model.wte.weight, "transformer.wpe.weight": model.wpe.weight}
    given |= {"lm_head.weight": model.wte.weight, "transformer.ln_f.weight": model.norm.weight}
    names = {"ln_1": "ln_1", "ln_2": "ln_2", "qkv": "attn.c_attn", "attn_out": "attn.c_proj"}
    for i, block in enumerate(model.blocks):
        for ours, theirs in {**names, "fc": "mlp.c_fc", "mlp_out": "mlp.c_proj"}.items():
            weight = getattr(block, ours).weight
            given[f"transformer.h.{i}.{theirs}.weight"] = (
                weight.T if weight.ndim == 2 else weight
            )  # Conv1D is (in, out)
    peer.load_state_dict(zeros | given)
    ids = torch.randint(90, (2, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(model.logits(ids), peer(input_ids=ids).logits, rtol=0, atol=1e-5)
