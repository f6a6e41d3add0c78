"""AdamW, the schedule and clipping against torch's own and against arithmetic by hand."""

import math

import pytest
import torch

from graft.base.optim.adamw import AdamW, decays
from graft.base.optim.clip import clip_gradients_
from graft.base.optim.schedule import learning_rate_at


def test_adamw_is_torchs() -> None:
    """Parity: 30 steps beside torch.optim.AdamW, decay on matrices only, a parameter without gradient at times."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"w": (7, 5), "norm": (5,), "sometimes": (3, 3)}
    start = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    ours = {name: value.clone().requires_grad_() for name, value in start.items()}
    theirs = {name: value.clone().requires_grad_() for name, value in start.items()}
    mine = AdamW(ours.items(), learning_rate=3e-2, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.3)
    reference = torch.optim.AdamW(
        [
            {"params": [theirs["w"], theirs["sometimes"]], "weight_decay": 0.3},
            {"params": [theirs["norm"]], "weight_decay": 0.0},
        ],
        lr=3e-2,
        betas=(0.8, 0.9),
        eps=1e-6,
    )
    for _step in range(30):
        for name, shape in shapes.items():
            gradient = torch.randn(shape, generator=generator)
            ours[name].grad, theirs[name].grad = gradient.clone(), gradient.clone()
        mine.step()
        reference.step()
        mine.zero_grad()
    for name in shapes:
        # float32 with another order of products: a few ulps a step
        torch.testing.assert_close(ours[name], theirs[name], atol=3e-6, rtol=3e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # bfloat16 beside float32 moments: the foreach form
def test_first_gradients_that_come_late(dtype: torch.dtype) -> None:
    """Parity: `late` has gradients from the fourth step on only, `rare` every third; both moved as torch.optim moves them."""
    generator = torch.Generator().manual_seed(0)
    start = {name: torch.randn(6, 4, generator=generator).to(dtype) for name in ("always", "late", "rare")}
    ours = {name: value.clone().requires_grad_() for name, value in start.items()}
    theirs = {name: value.float().clone().requires_grad_() for name, value in start.items()}
    mine = AdamW(ours.items(), learning_rate=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    reference = torch.optim.AdamW(theirs.values(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(8):
        for name in start:
            given = name == "always" or (name == "late" and step >= 3) or (name == "rare" and step % 3 == 1)
            gradient = torch.randn(6, 4, generator=generator).to(dtype) if given else None
            ours[name].grad, theirs[name].grad = gradient, None if gradient is None else gradient.float()
        if step == 5:  # resume in the middle
            state = {name: tensor.clone() for name, tensor in mine.state_tensors().items()}
            mine = AdamW(ours.items(), learning_rate=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
            mine.load_state_tensors(state)
        mine.step()
        reference.step()
    assert mine.steps == [8, 5, 3]
    for name in start:  # float32: another order of products; bfloat16: half a last place (2^-8 of up to 2) a step
        tolerance = {"atol": 1e-6, "rtol": 1e-6} if dtype == torch.float32 else {"atol": 4e-2, "rtol": 0.0}
        torch.testing.assert_close(ours[name].float(), theirs[name], **tolerance)


@pytest.mark.parametrize("moments", [torch.float32, torch.float64])
def test_one_late_step_by_hand(moments: torch.dtype) -> None:
    """Worked by hand: at its first gradient any parameter moves by lr = 0.01, here after two steps of another."""
    early, late = (torch.ones(3, dtype=moments, requires_grad=True) for _ in range(2))
    optimizer = AdamW([("early", early), ("late", late)], learning_rate=0.01, weight_decay=0.0)
    for step in range(3):
        early.grad = torch.ones_like(early)
        late.grad = torch.ones_like(late) if step == 2 else None
        optimizer.step()
    torch.testing.assert_close(late, torch.full_like(late, 0.99), atol=1e-7, rtol=0)


def test_adamw_first_step_by_hand() -> None:
    """Worked by hand: p = 1, g = 0.5, lr 0.1, decay 0.2. m_hat = g, v_hat = g^2, so the update is lr * g / |g| = 0.1;
    the decay takes lr * 0.2 * 1 = 0.02: p = 1 - 0.02 - 0.1 = 0.88."""
    p = torch.tensor([[1.0]], requires_grad=True)
    p.grad = torch.tensor([[0.5]])
    AdamW([("p", p)], learning_rate=0.1, weight_decay=0.2, eps=0.0).step()
    assert p.item() == pytest.approx(0.88, abs=1e-7)


def test_adamw_state_round_trip_and_refusals() -> None:
    p = torch.ones(2, 2, requires_grad=True)
    p.grad = torch.full((2, 2), 0.3)
    one = AdamW([("p", p)])
    one.step()
    two = AdamW([("p", p)])
    two.load_state_tensors({name: tensor.clone() for name, tensor in one.state_tensors().items()})
    assert two.n_steps == 1
    assert torch.equal(two.exp_avgs[0], one.exp_avgs[0])
    with pytest.raises(ValueError, match=r"optimizer state p\.exp_avg: nothing saved, \(2, 2\) due"):
        two.load_state_tensors({"n_steps": torch.tensor(1)})
    with pytest.raises(ValueError, match="no parameter to train"):
        AdamW([])
    with pytest.raises(ValueError, match="learning_rate=-1 is negative"):
        AdamW([("p", p)], learning_rate=-1)
    with pytest.raises(ValueError, match="must both lie in"):
        AdamW([("p", p)], betas=(1.0, 0.9))
    assert decays("w", torch.ones(2, 2))
    assert not decays("b", torch.ones(2))


def test_schedule_by_hand() -> None:
    """Worked by hand: peak 1, 2 warm-up steps, 7 in all: 1/2, 1, then the cosine over 4 gaps from 1 to 0.2; its middle
    is (1 + 0.2) / 2 = 0.6."""
    rates = [learning_rate_at(s, peak=1.0, warmup_steps=2, total_steps=7, final_fraction=0.2) for s in range(7)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[4] == pytest.approx(0.6)
    assert rates[6] == pytest.approx(0.2)
    assert rates == sorted(rates[:2]) + sorted(rates[2:], reverse=True)
    assert learning_rate_at(50, peak=1.0, warmup_steps=2, total_steps=7, final_fraction=0.2) == pytest.approx(0.2)


def test_clip_is_torchs() -> None:
    """Parity with torch.nn.utils.clip_grad_norm_, above and below the limit; 0 never clips."""
    for limit in (0.5, 100.0):
        ours = [torch.randn(4, 3, requires_grad=True), torch.randn(5, requires_grad=True)]
        for parameter in ours:
            parameter.grad = torch.randn_like(parameter)
        theirs = [p.detach().clone().requires_grad_() for p in ours]
        for mine, other in zip(ours, theirs, strict=True):
            assert mine.grad is not None
            other.grad = mine.grad.clone()
        norm = clip_gradients_(ours, limit)
        assert norm.item() == pytest.approx(torch.nn.utils.clip_grad_norm_(theirs, limit).item(), rel=1e-6)
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine.grad, other.grad)
    p = torch.ones(1, requires_grad=True)
    p.grad = torch.tensor([math.e])
    clip_gradients_([p], 0)
    assert p.grad.item() == pytest.approx(math.e)
