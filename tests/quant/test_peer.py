"""The optional bitsandbytes backend gives equal layers."""

import copy
import sys

import pytest
import torch
from torch import nn

from graft.quant import nf4_to_tensors, quantize_linears_


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64, bias=False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_results(dtype: torch.dtype) -> None:
    """Parity: same names, same stored tensors, same output and input gradient."""
    ours, theirs = small_model().to(dtype), small_model().to(dtype)
    assert quantize_linears_(ours) == quantize_linears_(theirs, backend="bitsandbytes") == ["0", "2"]
    assert type(theirs[0]).__name__ == "Linear4bit"
    expected = theirs.state_dict()
    for name in ("0", "2"):
        for key, tensor in nf4_to_tensors(f"{name}.weight", ours[int(name)]).items():
            assert torch.equal(tensor, expected[key]), key
    x = torch.randn(5, 64, dtype=dtype, requires_grad=True)
    outputs = [model(x) for model in (ours, theirs)]
    gradients = [torch.autograd.grad(y.sum(), x)[0] for y in outputs]
    assert torch.equal(*outputs)
    assert torch.equal(*gradients)


def test_already_quantized_by_it() -> None:
    model = small_model()
    quantize_linears_(model, backend="bitsandbytes")
    for backend in ("graft", "bitsandbytes"):
        with pytest.raises(ValueError, match=r"already quantized \(0 and 1 more\)"):
            quantize_linears_(copy.copy(model), backend=backend)


def test_bad_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="unknown quantization backend 'gptq'; choose graft or bitsandbytes"):
        quantize_linears_(small_model(), backend="gptq")
    with pytest.raises(ValueError, match=r"^bitsandbytes' layer takes nf4 or fp4 in blocks of 64, not int4 in 64"):
        quantize_linears_(small_model(), backend="bitsandbytes", quant_type="int4")
    spoiled = small_model()
    spoiled[2].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"2.weight: 1 of 8192 values are not finite"):
        quantize_linears_(spoiled, backend="bitsandbytes")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(
        ValueError, match=r"backend 'bitsandbytes' can't run here: .*pip install graftlm\[bitsandbytes\]"
    ):
        quantize_linears_(small_model(), backend="bitsandbytes")
