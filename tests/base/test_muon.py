"""Muon: orthogonal updates for hidden matrices, AdamW for the rest, resume to the bit."""

from pathlib import Path

import pytest
import torch

from graft.base.loss import next_token_loss
from graft.base.model.config import ModelConfig
from graft.base.model.init import parameter_roles
from graft.base.model.transformer import Transformer, initialize_
from graft.base.optim.adamw import AdamW
from graft.base.optim.muon import Muon
from graft.base.optim.polynomials import _long, _square, best_quintics, orthogonalize, quintics
from graft.base.run import TrainConfig
from graft.base.runlog import RunFolder
from graft.base.train import train
from graft.base.training.objective import Batch
from graft.base.training.optimizers import make_optimizer

POLYNOMIALS = quintics("best", 3)
TINY = ModelConfig(61, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_head=8, d_ff=64, max_seq_len=16)


def tiny() -> Transformer:
    model = Transformer(TINY)
    initialize_(model, seed=0)
    return model


def batch(seed: int) -> Batch:
    ids = torch.randint(0, 61, (4, 17), generator=torch.Generator().manual_seed(seed))
    return {"ids": ids[:, :-1], "targets": ids[:, 1:]}


@pytest.mark.parametrize("shape", [(24, 24), (64, 16), (16, 64), (3, 20, 12), (2, 3, 12, 16)])
def test_orthogonalize_keeps_the_singular_vectors(shape: tuple[int, ...]) -> None:
    """Parity with torch.linalg.svd: the result is U f(S) V^T with f(S) within the polynomials' band.

    f alone decides it: x -> a x + b x^3 + c x^5 for each of them, on each singular value s / |S|_2, computed here apart in
    float64. Values above 1% of the norm end in (0.73, 1.27), the band that the last polynomial leaves. The shapes go both
    ways: over X (sides alike) and over its Gram matrix alone (long ones).
    """
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    s = torch.linspace(0.02, 1, s.shape[-1], dtype=torch.float64).expand(s.shape)
    found = orthogonalize((u * s[..., None, :]) @ vt)
    x = s / s.norm(dim=-1, keepdim=True)
    for a, b, c in POLYNOMIALS:
        x = a * x + b * x**3 + c * x**5
    expected = (u * x[..., None, :]) @ vt
    torch.testing.assert_close(found, expected.float(), atol=1e-4, rtol=0)  # float32, amplified by 79 at s near 0
    large = s / s.norm(dim=-1, keepdim=True) > 0.01
    values = torch.linalg.svdvals(found)
    assert ((x[large] > 0.73) & (x[large] < 1.27)).all()
    assert values.max() < 1.2701
    near = (found.double() * (u @ vt)).sum() / (found.norm() * (u @ vt).norm())
    assert near > 0.95  # the cosine with U V^T itself, as every value is within 27% of one


def test_the_polynomials_are_the_best() -> None:
    """Law (equioscillation, Chebyshev 1854): an odd quintic is nearest to 1 on an interval exactly when its error reaches
    its largest size four times with signs in turn. The first interval is [0.01, 1], each next one what the last leaves."""
    low, high = 0.01, 1.0
    for a, b, c in POLYNOMIALS:
        x = torch.linspace(low, high, 200_001, dtype=torch.float64)
        error = a * x + b * x**3 + c * x**5 - 1
        largest = error.abs().max().item()
        turning = (error[1:-1] - error[:-2]) * (error[2:] - error[1:-1]) <= 0
        extremes = torch.cat([error[:1], error[1:-1][turning], error[-1:]])
        assert len(extremes) == 4
        assert (extremes.abs() / largest - 1).abs().max() < 1e-4  # the coefficients' digits
        assert (extremes[1:] * extremes[:-1] < 0).all()
        low, high = 1 - largest, 1 + largest
    assert (round(low, 2), round(high, 2)) == (0.73, 1.27)


def test_both_ways_are_one() -> None:
    """Law: iterating on the Gram matrix alone gives what iterating on the matrix gives."""
    x = torch.randn(3, 12, 40, generator=torch.Generator().manual_seed(4))
    x /= x.norm(dim=(-2, -1), keepdim=True)
    torch.testing.assert_close(
        _long(x, POLYNOMIALS), _square(x, POLYNOMIALS), atol=1e-5, rtol=0
    )  # float32, amplified by up to 79


def test_the_update_by_hand() -> None:
    """Worked by hand: the first step's momentum is 0.05 g, the look-ahead 0.05 g + 0.95 (0.05 g) is a multiple of g, and
    orthogonalize forgets the size: W' = W (1 - lr * decay) - lr * 0.2 sqrt(max(out, in)) * orthogonalize(g)."""
    g = torch.randn(6, 10, generator=torch.Generator().manual_seed(2))
    hidden, norm = torch.ones(6, 10, requires_grad=True), torch.ones(6, requires_grad=True)
    hidden.grad, norm.grad = g.clone(), torch.ones(6)
    optimizer = Muon([("mlp.weight", hidden), ("norm.weight", norm)], weight_decay=0.5)
    optimizer.step(0.1)
    expected = 1 - 0.1 * 0.5 - 0.1 * 0.2 * 10**0.5 * orthogonalize(g)
    torch.testing.assert_close(hidden.detach(), expected, atol=1e-4, rtol=0)  # the 1e-7 in its norm
    assert norm.tolist() == pytest.approx([0.9] * 6)  # AdamW's first step is lr * sign, and norms don't decay
    torch.testing.assert_close(optimizer.momenta[0], 0.05 * g)
    optimizer.zero_grad()
    assert hidden.grad is None


def test_the_second_update_by_hand() -> None:
    """Worked by hand: after g1 and g2 the momentum is 0.95 (0.05 g1) + 0.05 g2, and Nesterov's look-ahead, which is what
    is orthogonalized, 0.05 g2 + 0.95 of that."""
    one, two = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(3))
    hidden, norm = torch.zeros(5, 7, requires_grad=True), torch.ones(6, requires_grad=True)
    optimizer = Muon([("w", hidden), ("n", norm)], weight_decay=0.0)
    hidden.grad = one.clone()
    optimizer.step(0.1)
    before = hidden.detach().clone()
    hidden.grad = two.clone()
    optimizer.step(0.1)
    momentum = 0.95 * 0.05 * one + 0.05 * two
    torch.testing.assert_close(optimizer.momenta[0], momentum)
    update = orthogonalize(0.05 * two + 0.95 * momentum)
    torch.testing.assert_close(hidden.detach() - before, -0.1 * 0.2 * 7**0.5 * update, atol=1e-5, rtol=0)


def test_its_size_is_adamws() -> None:
    """Law: the root mean square of an update is 0.2 lr, whatever the shape (arXiv:2502.16982, eq. 4), within the band of
    orthogonalize: it serves with AdamW's learning rate."""
    for shape in ((32, 32), (64, 16), (8, 100)):
        p, other = torch.zeros(shape, requires_grad=True), torch.zeros(3, requires_grad=True)
        p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e-3
        Muon([("w", p), ("n", other)]).step(1.0)
        assert p.square().mean().sqrt().item() == pytest.approx(0.2, rel=0.25)


def test_embeddings_head_and_norms_go_to_adamw() -> None:
    """Law: after a step those parameters are exactly AdamW's, and the hidden ones are not."""
    model, twin = tiny(), tiny()
    config = TrainConfig(optimizer="muon")
    muon = make_optimizer(model.named_parameters(), config, roles=parameter_roles(model))
    adamw = AdamW(twin.named_parameters())
    assert isinstance(muon, Muon)
    for one, optimizer in ((model, muon), (twin, adamw)):
        (next_token_loss(one, batch(0)) / 64).backward()
        optimizer.step(1e-2)
    theirs = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        to_adamw = "embed" in name or "norm" in name
        assert torch.equal(parameter, theirs[name]) == to_adamw, name
    assert {name for name, _ in muon.adamw.named} == {name for name in theirs if "embed" in name or "norm" in name}


def test_parameters_without_gradient_are_left_alone() -> None:
    ps = [torch.ones(4, 4, requires_grad=True) for _ in range(2)] + [torch.ones(4, requires_grad=True)]
    ps[1].grad = torch.eye(4)
    Muon(zip(("a", "b", "n"), ps, strict=True)).step()
    assert torch.equal(ps[0], torch.ones(4, 4))
    assert torch.equal(ps[2], torch.ones(4))
    assert not torch.equal(ps[1], torch.ones(4, 4))


def test_resume_is_bit_identical(tmp_path: Path) -> None:
    """Law: five steps, and three that die and two more, give the same weights and state."""
    config = TrainConfig(steps=5, optimizer="muon", checkpoint_every=3, warmup_steps=1, learning_rate=1e-2)

    def run(name: str, *, stop: int | None = None, resume: bool = False) -> tuple[Transformer, Muon]:
        model = tiny()
        optimizer = make_optimizer(model.named_parameters(), config, roles=parameter_roles(model))
        assert isinstance(optimizer, Muon)
        folder = RunFolder(tmp_path / name, stage="test", resume=resume)
        folder.start({}, seed=0)

        def batches(step: int) -> list[Batch]:
            if step == stop:
                raise RuntimeError("the power fails")
            return [batch(step)]

        train(model, optimizer, batches, config, folder)
        return model, optimizer

    whole, first = run("whole")
    with pytest.raises(RuntimeError, match="the power fails"):
        run("cut", stop=4)
    resumed, second = run("cut", resume=True)
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)
    one, other = first.state_tensors(), second.state_tensors()
    assert set(one) == set(other)
    assert any(name.endswith(".momentum") for name in one)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_learns_one_batch() -> None:
    """Learning: 40 steps at one rate bring the loss on one batch under 0.1."""
    model = tiny()
    optimizer = Muon(model.named_parameters(), learning_rate=2e-2, weight_decay=0.0)
    for _ in range(40):
        loss = next_token_loss(model, batch(0)) / 64
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.1


def test_refusals() -> None:
    w, n = ("w", torch.ones(2, 2, requires_grad=True)), ("n", torch.ones(2, requires_grad=True))
    with pytest.raises(ValueError, match=r"momentum=1 must lie in \[0, 1\)"):
        Muon([w, n], momentum=1)
    for named in ([w], [n]):
        with pytest.raises(ValueError, match="muon needs hidden matrices and other parameters; use optimizer adamw"):
            Muon(named)
    optimizer = Muon([w, n])
    state = optimizer.state_tensors()
    with pytest.raises(ValueError, match=r"optimizer state w\.momentum: nothing saved, \(2, 2\) due"):
        optimizer.load_state_tensors({k: v for k, v in state.items() if k != "w.momentum"})
    with pytest.raises(ValueError, match=r"optimizer state w\.momentum: \(3, 2\) saved, \(2, 2\) due"):
        optimizer.load_state_tensors(state | {"w.momentum": torch.ones(3, 2)})


@pytest.mark.parametrize(("n", "low"), [(2, 10**-1.5), (5, 1e-3)])
def test_more_polynomials_are_the_best_for_smaller_values(n: int, low: float) -> None:
    """Law: n of them bring all singular values from 10^(-(n + 1) / 2) on nearer to 1 than Jordan's quintic does in as many."""
    x = torch.linspace(low, 1, 100_001, dtype=torch.float64)
    ours, jordans = x.clone(), x.clone()
    for (a, b, c), (d, e, f) in zip(quintics("best", n), quintics("jordan", n), strict=True):
        ours = a * ours + b * ours**3 + c * ours**5
        jordans = d * jordans + e * jordans**3 + f * jordans**5
    assert (ours - 1).abs().max() < (jordans - 1).abs().max()


def test_many_polynomials_end_in_newton_schulz() -> None:
    """Worked by hand: the best odd quintic on an interval that is one point, 1, has p = 1, p' = 0 and p'' = 0 there: 15/8, -10/8,
    3/8, the Newton-Schulz iteration of order five."""
    assert best_quintics(0.5, 6)[-1] == pytest.approx((15 / 8, -10 / 8, 3 / 8), abs=1e-4)


def test_normalized_rows_by_hand() -> None:
    """Worked by hand (arXiv:2510.05491, algorithm 1): O = orthogonalize(g); v = 0.05 mean over a row of O^2; the update is
    O / sqrt(v), scaled to a root mean square of 0.2. The second step has v = 0.95 v + 0.05 mean(O2^2)."""
    one, two = torch.randn(2, 6, 10, generator=torch.Generator().manual_seed(2))
    hidden, norm = torch.zeros(6, 10, requires_grad=True), torch.ones(6, requires_grad=True)
    optimizer = Muon([("w", hidden), ("n", norm)], weight_decay=0.0, normalize_rows=True, momentum=0.0)
    v, expected = torch.zeros(6, 1), torch.zeros(6, 10)
    for gradient in (one, two):
        hidden.grad = gradient.clone()
        optimizer.step(0.1)
        o = orthogonalize(gradient)  # without momentum
        v = 0.95 * v + 0.05 * (o * o).mean(1, keepdim=True)
        normalized = o / v.sqrt()
        expected -= 0.1 * 0.2 * normalized / (normalized**2).mean().sqrt()
    torch.testing.assert_close(hidden.detach(), expected, atol=1e-5, rtol=0)
    assert set(optimizer.state_tensors()) >= {"w.momentum", "w.row_square"}


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (3, 8, 8)])
def test_normalized_rows_are_alike(shape: tuple[int, ...]) -> None:
    """Law: at the first step, whose history is itself, every row of the update has the same norm."""
    w, n = torch.zeros(shape, requires_grad=True), torch.ones(3, requires_grad=True)
    w.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.rand(shape[-2])[:, None]
    Muon([("w", w), ("n", n)], hidden=lambda name, _: name == "w", normalize_rows=True).step(1.0)
    torch.testing.assert_close(w.detach().square().mean(-1).sqrt(), torch.full(shape[:-1], 0.2), atol=1e-4, rtol=0)


def test_switches_reach_the_optimizer() -> None:
    """Law: each of Muon's settings of TrainConfig changes the update, and rows' state is saved and put back."""
    found = []
    for more in ({}, {"muon_normalize_rows": True}, {"muon_polynomial": "jordan"}, {"muon_iterations": 5}):
        model = tiny()
        config = TrainConfig(optimizer="muon", **more)
        optimizer = make_optimizer(model.named_parameters(), config, roles=parameter_roles(model))
        (next_token_loss(model, batch(0)) / 64).backward()
        optimizer.step(1e-2)
        found.append(model.model.layers[0].self_attn.q_proj.weight.detach().clone())
        again = make_optimizer(tiny().named_parameters(), config, roles=parameter_roles(model))
        again.load_state_tensors(optimizer.state_tensors())
        state = optimizer.state_tensors()
        assert all(torch.equal(t, state[name]) for name, t in again.state_tensors().items())
        assert any(name.endswith(".row_square") for name in state) == ("muon_normalize_rows" in more)
    assert all(not torch.equal(found[i], found[j]) for i in range(4) for j in range(i))


def test_polynomial_refusals() -> None:
    with pytest.raises(ValueError, match="unknown muon_polynomial 'cubic'; choose best or jordan"):
        quintics("cubic", 3)
    with pytest.raises(ValueError, match=r"muon_iterations=0 must lie in 1\.\.12"):
        quintics("best", 0)
