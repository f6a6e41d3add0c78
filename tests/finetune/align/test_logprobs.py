"""Parity with log_softmax of whole logits and with transformers, for every kind of head; laws of packing, masks and memory."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from graft.base.model.config import ModelConfig
from graft.base.model.huggingface import save_model
from graft.base.model.transformer import Transformer, initialize_
from graft.finetune.adapters.lora import LoraConfig, attach_lora
from graft.finetune.align import logprobs
from graft.finetune.align.logprobs import response_logprobs
from graft.kernels.cross_entropy import torch_cross_entropy
from graft.quant.linear import quantize_linears_

V = 97


def small_model(*, tied: bool = False, vocab_size: int = V) -> Transformer:
    config = ModelConfig(
        vocab_size,
        d_model=32,
        n_layers=2,
        n_heads=4,
        n_kv_heads=2,
        d_head=8,
        d_ff=64,
        max_seq_len=64,
        tie_embeddings=tied,
    )
    model = Transformer(config)
    initialize_(model, seed=0)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # probabilities far from uniform
    return model


def batch(B: int = 3, T: int = 11) -> tuple[torch.Tensor, torch.Tensor]:
    """ids, and a mask with prompts of different lengths and padding at the end."""
    ids = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(1))
    at, start = torch.arange(T)[None], torch.tensor([[1], [4], [7]])[:B]
    return ids, (at >= start) & (at < torch.tensor([[11], [9], [8]])[:B])


def expected(model, ids, mask, temperature=1.0):
    """From all logits at once: log p and entropy, (B, T)."""
    log_p = F.log_softmax(model(ids).float()[:, :-1] / temperature, -1)  # (B, T - 1, V)
    logp = log_p.gather(-1, ids[:, 1:, None]).squeeze(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return tuple(F.pad(values, (1, 0)).where(mask, 0.0) for values in (logp, entropy))


def plain(vocab_size: int = V) -> Transformer:
    return small_model(vocab_size=vocab_size)


def tied() -> Transformer:
    return small_model(tied=True)


def adapted_head(vocab_size: int = V) -> Transformer:
    model = small_model(vocab_size=vocab_size)
    attach_lora(model, LoraConfig(rank=4, targets=("lm_head", "q_proj")))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):
            nn.init.normal_(parameter, 0.0, 0.3)
    return model


def quantized_head(vocab_size: int = V) -> Transformer:
    model = small_model(vocab_size=vocab_size)
    quantize_linears_(model, keep=())
    return model


def biased_head() -> Transformer:
    model = small_model()
    head = nn.Linear(32, V)
    head.weight, head.bias = model.lm_head.weight, nn.Parameter(torch.randn(V))
    model.lm_head = head
    return model


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 4 tokens, so that these batches have several."""
    monkeypatch.setattr(torch_cross_entropy, "chunk_rows", lambda V: 4)
    monkeypatch.setattr(logprobs, "chunk_rows", lambda V: 4)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("make", [plain, tied, adapted_head, quantized_head, biased_head])
def test_values_and_gradients(make, temperature, small_chunks):
    """Parity: with an upstream gradient of its own for each token, values and every parameter's gradient are those of
    log_softmax over whole logits; the entropies' too. Tolerance: float32 sums in another order."""
    model = make()
    ids, mask = batch()
    upstream = torch.randn(2, *ids.shape, generator=torch.Generator().manual_seed(2))
    trained = [p for p in model.parameters() if p.requires_grad]
    want = expected(model, ids, mask, temperature)
    got = response_logprobs(model, ids, mask, temperature=temperature)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want[0], atol=1e-5, rtol=1e-5)
    assert torch.equal(got[~mask], torch.zeros(int((~mask).sum())))
    both = response_logprobs(model, ids, mask, temperature=temperature, return_entropy=True)
    for ours, theirs in zip(both, want, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    wanted = torch.autograd.grad((want[0] * upstream[0]).sum(), trained, retain_graph=True)
    for ours in (got, both[0]):
        grads = torch.autograd.grad((ours * upstream[0]).sum(), trained, retain_graph=True)
        for a, b in zip(grads, wanted, strict=True):
            torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)
    wanted = torch.autograd.grad(sum((w * u).sum() for w, u in zip(want, upstream, strict=True)), trained)
    grads = torch.autograd.grad(sum((g * u).sum() for g, u in zip(both, upstream, strict=True)), trained)
    for a, b in zip(grads, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


def test_worked_by_hand():
    """Hidden [log 3], weight [[1], [0]]: probabilities 3/4 and 1/4, entropy 3/4 log(4/3) + 1/4 log 4; at temperature 1/2 the
    logits double: 9/10 and 1/10."""
    head = nn.Linear(1, 2, bias=False)
    head.weight = nn.Parameter(torch.tensor([[1.0], [0.0]]))
    hidden = torch.tensor([[3.0]]).log()
    logp, entropy = logprobs.head_logprobs(head, hidden, torch.tensor([1]), n_vocab=2)
    torch.testing.assert_close(logp, torch.tensor([0.25]).log())
    want = 0.75 * torch.tensor([4 / 3]).log() + 0.25 * torch.tensor([4.0]).log()
    torch.testing.assert_close(entropy, want)
    logp, _ = logprobs.head_logprobs(head, hidden, torch.tensor([1]), temperature=0.5, n_vocab=2)
    torch.testing.assert_close(logp, torch.tensor([0.1]).log())


def test_parity_with_transformers(tmp_path: Path):
    """The same folder read by transformers gives the same log-probabilities. Tolerance: two implementations in float32."""
    transformers = pytest.importorskip("transformers")
    model = small_model()
    save_model(model, tmp_path)
    ids, mask = batch()
    with torch.no_grad():
        logits = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits
        want = -F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(3, -1)
        got = response_logprobs(model, ids, mask)
    torch.testing.assert_close(got[:, 1:], want.where(mask[:, 1:], 0.0), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("return_entropy", [False, True])
def test_packed_is_each_alone(return_entropy):
    """Law: two documents in one row, with positions and cu_seqlens, have the log-probabilities that each has alone."""
    model = small_model()
    ids, mask = batch(2)
    lengths = [8, 9]
    alone = response_logprobs(
        model, ids, mask & (torch.arange(11) < torch.tensor(lengths)[:, None]), return_entropy=True
    )
    row, row_mask = (torch.cat([t[i, :n] for i, n in enumerate(lengths)])[None] for t in (ids, mask))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = response_logprobs(
        model, row, row_mask, positions=positions, cu_seqlens=torch.tensor([0, 8, 17], dtype=torch.int32),
        return_entropy=return_entropy,
    )  # fmt: skip
    for got, want in zip(packed if return_entropy else (packed,), alone, strict=False):
        want = torch.cat([want[i, :n] for i, n in enumerate(lengths)])[None]
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operator made."""

    n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            self.n = max(self.n, t.numel() if isinstance(t, torch.Tensor) else 0)
        return out


@pytest.mark.parametrize("return_entropy", [False, True])
@pytest.mark.parametrize("make", [plain, adapted_head, quantized_head])
def test_never_holds_all_logits(make, return_entropy, small_chunks, monkeypatch):
    """Law: forward and backward, no tensor is as large as tokens x vocabulary, or even a quarter of it, nor is all that the
    graph keeps between the two."""
    n_vocab = 1000
    model = make(n_vocab)
    ids = torch.randint(0, n_vocab, (8, 33))
    mask = torch.ones(8, 33, dtype=torch.bool)
    mask[:, 0] = False
    kept: dict[int, int] = {}  # storage -> elements that the graph keeps for the backward pass

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // tensor.element_size()
        return tensor

    with Largest() as mode, torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        hidden, head = logprobs.hidden_and_head(model, ids, None, None)
        kept.clear()  # what the layers keep is theirs
        monkeypatch.setattr(logprobs, "hidden_and_head", lambda *_: (hidden, head))
        out = response_logprobs(model, ids, mask, return_entropy=return_entropy)
        n_kept = sum(kept.values())
        sum(t.sum() for t in (out if return_entropy else (out,))).backward()
    assert mode.n <= 8 * 32 * n_vocab / 4
    assert n_kept <= 8 * 32 * n_vocab / 4


def test_prompts_and_padding_reach_no_head():
    """Law: the head sees as many rows as the mask has trues, and gradients of hidden states elsewhere come from attention only:
    a mask that names one token of one row gives the other rows' embeddings none."""
    model = small_model()
    ids, mask = batch()
    ids = torch.arange(33).view(3, 11)  # every id once
    mask = torch.zeros_like(mask)
    mask[1, 5] = True
    response_logprobs(model, ids, mask).sum().backward()
    moved = model.model.embed_tokens.weight.grad.abs().sum(1).nonzero().flatten().tolist()
    assert moved == [11, 12, 13, 14, 15]


@pytest.mark.parametrize("return_entropy", [False, True])
def test_no_token_to_score(return_entropy):
    """Law: an empty mask gives zeros, and gradients of zero."""
    model = small_model()
    ids, mask = batch()
    out = response_logprobs(model, ids, torch.zeros_like(mask), return_entropy=return_entropy)
    for values in out if return_entropy else (out,):
        assert torch.equal(values, torch.zeros(3, 11))


def test_no_grad_is_the_same(small_chunks):
    model = small_model()
    ids, mask = batch()
    with torch.no_grad():
        got = response_logprobs(model, ids, mask, return_entropy=True)
    assert not got[0].requires_grad
    for a, b in zip(got, response_logprobs(model, ids, mask, return_entropy=True), strict=True):
        assert torch.equal(a, b)


def test_bad_input():
    model = small_model()
    ids, mask = batch()
    with pytest.raises(ValueError, match=r"ids \(3, 11\) and mask \(3, 10\) torch.bool don't fit"):
        response_logprobs(model, ids, mask[:, 1:])
    with pytest.raises(ValueError, match=r"mask \(3, 11\) torch.int64 don't fit"):
        response_logprobs(model, ids, mask.long())
    with pytest.raises(ValueError, match=r"temperature=0 must be > 0"):
        response_logprobs(model, ids, mask, temperature=0)
    mask[2, 0] = True
    with pytest.raises(ValueError, match=r"mask\[2, 0\] names the first token of a sequence"):
        response_logprobs(model, ids, mask)
    row = torch.zeros(1, 6, dtype=torch.bool)
    row[0, 3] = True
    with pytest.raises(ValueError, match=r"mask\[0, 3\] names the first token"):
        response_logprobs(model, ids[:1, :6], row, cu_seqlens=torch.tensor([0, 3, 6], dtype=torch.int32))
