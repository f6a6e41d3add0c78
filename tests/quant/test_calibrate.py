"""Codes chosen by GPTQ: the paper's update by hand, laws of the output error, and a layer walk that keeps the format."""

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor, nn

from graft.quant import NF4Linear, dequantize_nf4, quantize_4bit, quantize_linears_, quantize_nf4
from graft.quant.calibrate import calibrate_, calibrated_4bit, output_error, pack, round_columns, unpack
from graft.quant.codebooks import nf4

CODEBOOK = torch.tensor(nf4())


def correlated_inputs(n: int, n_in: int, seed: int = 0) -> Tensor:
    """Inputs as a trained network's: a few directions carry most of the variance."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(n_in, n_in, generator=generator) * torch.logspace(0, -2, n_in)[:, None]
    return torch.randn(n, n_in, generator=generator) @ mixing


def nearest(values: Tensor) -> Tensor:
    return CODEBOOK[(values[..., None] - CODEBOOK).abs().argmin(-1)]


def test_two_columns_by_hand() -> None:
    """Worked by hand: column 0 (the larger H_00) is rounded; then the best column 1, minimising H_00 e0^2 + 2 H_01 e0 e1 +
    H_11 e1^2 over e1, is w1 - e0 H_01 / H_11, which is rounded in turn. Scales are 1."""
    weight = torch.rand(200, 2, generator=torch.Generator().manual_seed(0)) * 1.6 - 0.8
    hessian = torch.tensor([[4.0, 1.5], [1.5, 1.0]])
    codes = round_columns(weight, hessian, torch.ones(200, 2), CODEBOOK, damping=0.0)
    first = nearest(weight[:, 0])
    second = nearest(weight[:, 1] - (first - weight[:, 0]) * 1.5 / 1.0)
    assert torch.equal(CODEBOOK[codes.int()], torch.stack([first, second], 1))
    assert not torch.equal(second, nearest(weight[:, 1])), "the example would not see a missing update"


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(32, 64), (48, 192), (7, 33), (5, 300)])
def test_uncorrelated_inputs_give_plain_rounding(shape: tuple[int, int], quant_type: str) -> None:
    """Law: where inputs are uncorrelated no column can make up for another, so each weight takes its nearest code.

    One level of scales: with two, the decoded absmax differs from that by which plain rounding divides.
    """
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    hessian = torch.diag(torch.rand(shape[1], generator=torch.Generator().manual_seed(1)) + 0.5)
    packed, state = calibrated_4bit(weight, hessian, quant_type, double_quant=False)
    plain, plain_state = quantize_4bit(weight, quant_type, double_quant=False)
    assert torch.equal(dequantize_nf4(packed, state), dequantize_nf4(plain, plain_state))


@pytest.mark.parametrize("double_quant", [True, False])
def test_output_error_and_format(double_quant: bool) -> None:
    """Law: on correlated inputs the output error is below half of plain rounding's; scales are the same to the bit, and
    bitsandbytes dequantizes the result to our values."""
    weight = torch.randn(96, 256, generator=torch.Generator().manual_seed(0))
    x = correlated_inputs(2000, 256)
    hessian = x.T @ x
    packed, state = calibrated_4bit(weight, hessian, double_quant=double_quant)
    plain, plain_state = quantize_nf4(weight, double_quant=double_quant)
    error, plain_error = (
        output_error(dequantize_nf4(p, s) - weight, hessian) for p, s in ((packed, state), (plain, plain_state))
    )
    assert error < 0.5 * plain_error
    assert error == pytest.approx((x @ (dequantize_nf4(packed, state) - weight).T).square().sum().item(), rel=1e-2)
    assert packed.shape == plain.shape
    assert all(
        torch.equal(a, b)
        for a, b in zip(state.weight(packed).tensors[1:], plain_state.weight(plain).tensors[1:], strict=True)
    )
    _, their_state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=double_quant)
    assert torch.equal(bnb.dequantize_4bit(packed, their_state), dequantize_nf4(packed, state))


def test_inputs_that_are_never_active() -> None:
    """Law: dead inputs, all inputs dead, and fewer rows than inputs are no reason to fail."""
    weight = torch.randn(8, 64)
    x = correlated_inputs(10, 64)
    x[:, 5] = 0
    for inputs in (x, torch.zeros_like(x), x * 1e-12):
        packed, state = calibrated_4bit(weight, inputs.T @ inputs)
        assert dequantize_nf4(packed, state).isfinite().all()


def test_zero_weights_stay_zero() -> None:
    """Law: a block whose absmax is 0 decodes to 0 whatever the others' errors are."""
    weight = torch.randn(4, 128)
    weight[:, :64] = 0
    x = correlated_inputs(500, 128)
    packed, state = calibrated_4bit(weight, x.T @ x, double_quant=False)
    assert dequantize_nf4(packed, state)[:, :64].abs().max() == 0


def test_pack_and_unpack() -> None:
    """Worked by hand: codes 1, 2, 3 are 0x12 and 0x37 (an odd number is filled up with zero's code)."""
    codes = torch.tensor([1, 2, 3], dtype=torch.uint8)
    assert pack(codes).flatten().tolist() == [0x12, 0x37]
    assert torch.equal(unpack(pack(codes), 3), codes)


class Block(nn.Module):
    """Two layers on one input, then one on their sum: the shape of a feed-forward."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(64, 128), nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x: Tensor, factor: float, *, shift: float) -> Tensor:
        return x + factor * self.down(torch.relu(self.gate(x)) * self.up(x)) + shift


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Embedding(50, 64), nn.ModuleList([Block(), Block()])

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x, 0.5, shift=0.1)
        return x


def test_a_model_block_by_block() -> None:
    """Law: every layer is calibrated once, in order, and the model's outputs on other rows come nearer to full precision's."""
    torch.manual_seed(0)
    full, plain, ours = Model(), Model(), Model()
    for model in (plain, ours):
        model.load_state_dict(full.state_dict())
        quantize_linears_(model, keep=())
    weights = {name: parameter.detach() for name, parameter in full.named_parameters()}
    read: list[str] = []
    blocks = [(f"blocks.{i}", block) for i, block in enumerate(ours.blocks)]
    ids = torch.randint(0, 50, (40, 1, 64), generator=torch.Generator().manual_seed(1))
    done: list[int] = []
    n = calibrate_(ours, blocks, list(ids[:30]), lambda name: read.append(name) or weights[name], on_block=done.append)
    assert (n, done) == (6, [1, 2])
    assert read == [f"blocks.{i}.{name}.weight" for i in (0, 1) for name in ("gate", "up", "down")]
    with torch.no_grad():
        truth = full(ids[30:, 0])
        error, plain_error = ((model(ids[30:, 0]) - truth).square().mean() for model in (ours, plain))
    assert error < 0.85 * plain_error
    assert isinstance(ours.blocks[0].gate, NF4Linear)


def test_bad_arguments() -> None:
    weight = torch.randn(8, 64)
    with pytest.raises(
        ValueError, match=r"hessian: expected finite \(64, 64\) values for a weight \(8, 64\), got \(63, 63\)"
    ):
        calibrated_4bit(weight, torch.eye(63))
    with pytest.raises(ValueError, match=r"got \(64, 64\) with 4096 that are not finite"):
        calibrated_4bit(weight, torch.eye(64) * float("inf"))
    with pytest.raises(ValueError, match="512 of 512 values are not finite"):
        calibrated_4bit(weight * float("nan"), torch.eye(64))
    model = Model()
    quantize_linears_(model, keep=())
    model.blocks[0].spare = NF4Linear.from_linear(nn.Linear(64, 64))
    with pytest.raises(ValueError, match=r"blocks\.0\.spare never ran on the calibration text"):
        calibrate_(model, [("blocks.0", model.blocks[0])], [torch.zeros(1, 4, dtype=torch.int64)], lambda name: weight)
    with pytest.raises(ValueError, match="the model ran without its first block"):
        calibrate_(model, [("other", Block())], [torch.zeros(1, 4, dtype=torch.int64)], lambda name: weight)
