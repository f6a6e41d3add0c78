"""SOAP: the paper's algorithm in float64 beside it, sides by role, resume to the bit."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from graft.base.loss import next_token_loss
from graft.base.model.config import ModelConfig
from graft.base.model.init import Role, parameter_roles
from graft.base.model.transformer import Transformer, initialize_
from graft.base.optim.adamw import AdamW
from graft.base.optim.soap import SOAP
from graft.base.run import TrainConfig
from graft.base.training.optimizers import make_optimizer

TINY = ModelConfig(61, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_head=8, d_ff=64, max_seq_len=16)


def reference(
    gradients: list[np.ndarray],
    w: np.ndarray,
    ql: np.ndarray,  # bases after the first gradient
    qr: np.ndarray,
    *,
    left: bool,
    right: bool,
    every: int,
    decay: float,
) -> np.ndarray:
    """arXiv:2409.11321, algorithms 3 and 4, a step at a time: beta 0.9 and 0.95, eps 1e-8, rate 0.1; the first gradient only
    sets the bases, as in the authors' code."""
    momentum, second = np.zeros(w.shape), np.zeros(w.shape)
    for t, g in enumerate(gradients):
        if t == 0:
            el, er = g @ g.T, g.T @ g
            continue
        momentum = 0.9 * momentum + 0.1 * g
        second = 0.95 * second + 0.05 * (ql.T @ g @ qr) ** 2
        adam = (ql.T @ momentum @ qr / (1 - 0.9**t)) / (np.sqrt(second / (1 - 0.95**t)) + 1e-8)
        w = w * (1 - 0.1 * decay) - 0.1 * (ql @ adam @ qr.T)
        el, er = 0.95 * el + 0.05 * g @ g.T, 0.95 * er + 0.05 * g.T @ g
        if t % every == 0:
            if left:
                order = np.argsort(-np.einsum("ij,ij->j", ql, el @ ql))
                second, ql = second[order], np.linalg.qr((el @ ql)[:, order])[0]
            if right:
                order = np.argsort(-np.einsum("ij,ij->j", qr, er @ qr))
                second, qr = second[:, order], np.linalg.qr((er @ qr)[:, order])[0]
    return w


@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (6, 6)])
@pytest.mark.parametrize(("left", "right"), [(True, True), (False, True), (True, False)])
def test_is_the_papers_algorithm(shape: tuple[int, int], left: bool, right: bool) -> None:
    """Parity with `reference`: 12 steps with three refreshes. Gradients of unlike scales, so that no two eigenvalues meet."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.linspace(1, 3, shape[0])[:, None] * torch.linspace(1, 2, shape[1])
    gradients = [torch.randn(shape, generator=generator) * scale for _ in range(12)]
    w = torch.randn(shape, generator=generator).requires_grad_()
    start = w.detach().double().numpy()
    optimizer = SOAP([("w", w)], learning_rate=0.1, weight_decay=0.2, every=3, sides=lambda n, p: (left, right))
    w.grad = gradients[0].clone()
    optimizer.step()
    assert torch.equal(w.detach().double(), torch.from_numpy(start))
    bases = {"left": torch.eye(shape[0]), "right": torch.eye(shape[1])} | optimizer.rotated[0].bases
    for side, gram in (("left", gradients[0] @ gradients[0].T), ("right", gradients[0].T @ gradients[0])):
        if side in optimizer.rotated[0].sides:  # orthonormal columns that make it diagonal, the largest value first
            q = bases[side]
            values = q.T @ gram @ q
            torch.testing.assert_close(q.T @ q, torch.eye(len(q)), atol=1e-5, rtol=0)
            torch.testing.assert_close(values, values.diag().diag(), atol=1e-3, rtol=0)  # of values up to 200
            assert (values.diag().diff() < 1e-3).all()
    expected = reference(
        [g.double().numpy() for g in gradients],
        start,
        *(bases[side].double().numpy().copy() for side in ("left", "right")),
        **{"left": left, "right": right, "every": 3, "decay": 0.2},
    )
    for gradient in gradients[1:]:
        w.grad = gradient.clone()
        optimizer.step()
    torch.testing.assert_close(
        w.detach().double(), torch.from_numpy(expected), atol=1e-4, rtol=0
    )  # float32, QR three times


def test_a_stack_is_its_matrices() -> None:
    """Law: three experts in one tensor (3, n, n), whose Gram matrices have one basis each, move as three matrices do."""
    generator = torch.Generator().manual_seed(1)
    stacked = torch.randn(3, 5, 5, generator=generator).requires_grad_()
    apart = [stacked.detach()[i].clone().requires_grad_() for i in range(3)]
    one = SOAP([("w", stacked)], every=2)
    other = SOAP([(str(i), w) for i, w in enumerate(apart)], every=2)
    for _ in range(5):
        stacked.grad = torch.randn(3, 5, 5, generator=generator)
        for i, w in enumerate(apart):
            w.grad = stacked.grad[i].clone()
        one.step()
        other.step()
    torch.testing.assert_close(stacked.detach(), torch.stack([w.detach() for w in apart]), atol=1e-6, rtol=1e-5)


def test_on_no_side_it_is_adamw() -> None:
    """Law: with the identity for both bases SOAP is AdamW one gradient late; `largest` leaves out sides that are longer."""
    start = torch.randn(4, 3, generator=torch.Generator().manual_seed(2))
    w, twin = start.clone().requires_grad_(), start.clone().requires_grad_()
    optimizer = SOAP([("w", w)], learning_rate=0.1, largest=3)
    assert optimizer.rotated[0].sides == ["right"]
    optimizer.rotated[0].sides = []
    optimizer.rotated[0].bases.clear()
    adamw = AdamW([("w", twin)], learning_rate=0.1)
    for i in range(4):
        gradient = torch.randn(4, 3, generator=torch.Generator().manual_seed(i))
        w.grad, twin.grad = gradient.clone(), gradient.clone() if i else None
        optimizer.step()
        adamw.step()
        if i == 0:
            optimizer.rotated[0].bases.clear()
    torch.testing.assert_close(w.detach(), twin.detach(), atol=1e-6, rtol=1e-5)


def tiny() -> Transformer:
    model = Transformer(TINY)
    initialize_(model, seed=0)
    return model


def stepper(config: TrainConfig) -> tuple[Transformer, SOAP, Callable[[int], Tensor]]:
    model = tiny()
    optimizer = make_optimizer(model.named_parameters(), config, roles=parameter_roles(model))
    assert isinstance(optimizer, SOAP)

    def step(seed: int) -> Tensor:
        ids = torch.randint(0, 61, (4, 17), generator=torch.Generator().manual_seed(seed))
        loss = next_token_loss(model, {"ids": ids[:, :-1], "targets": ids[:, 1:]}) / 64
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return model, optimizer, step


def test_sides_follow_roles() -> None:
    """Law: the vocabulary's side is never rotated, hidden matrices have both, norms go to AdamW; soap_largest holds."""
    _, optimizer, _ = stepper(TrainConfig(optimizer="soap"))
    sides = {one.name: one.sides for one in optimizer.rotated}
    assert sides["model.embed_tokens.weight"] == ["right"]
    assert sides["model.layers.0.mlp.down_proj.weight"] == ["left", "right"]
    assert optimizer.adamw is not None
    assert all("norm" in name for name, _ in optimizer.adamw.named)
    _, optimizer, _ = stepper(TrainConfig(optimizer="soap", soap_largest=32))
    assert {one.name: one.sides for one in optimizer.rotated}["model.layers.0.mlp.down_proj.weight"] == ["left"]


def test_of_a_low_rank_factor_the_ranks_side_is_rotated() -> None:
    """Law: of lora_a (R, in) the rows, of lora_b (out, R) the columns: Gram matrices stay as small as the factors."""
    factors = {"lora_a": torch.ones(2, 9, requires_grad=True), "lora_b": torch.ones(9, 2, requires_grad=True)}
    roles: dict[str, Role] = dict.fromkeys(factors, "adapter")
    optimizer = make_optimizer(factors.items(), TrainConfig(optimizer="soap"), roles=roles)
    assert isinstance(optimizer, SOAP)
    assert {one.name: one.sides for one in optimizer.rotated} == {"lora_a": ["left"], "lora_b": ["right"]}


def test_learns_one_batch_and_resumes_to_the_bit() -> None:
    """Learning: 60 steps bring the loss on one batch under 0.1. Law: state saved at step 13 and put back gives equal bits."""
    config = TrainConfig(optimizer="soap", learning_rate=1e-2, weight_decay=0.0, soap_every=4)
    model, optimizer, step = stepper(config)
    for _ in range(13):
        step(0)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    state = {name: tensor.clone() for name, tensor in optimizer.state_tensors().items()}
    for _ in range(47):
        loss = step(0)
    assert loss < 0.1
    again, second, step = stepper(config)
    again.load_state_dict(weights, strict=False)
    second.load_state_tensors(state)
    for _ in range(47):
        step(0)
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    assert set(second.state_tensors()) == set(state)


def test_refusals() -> None:
    w = torch.ones(3, 2, requires_grad=True)
    for options, message in (
        ({"every": 0}, "soap_every=0 must be >= 1"),
        ({"largest": 0}, "soap_largest=0 must be >= 1"),
        ({"largest": 1}, "no matrix to rotate with a side of at most soap_largest=1; use optimizer adamw"),
    ):
        with pytest.raises(ValueError, match=message):
            SOAP([("w", w)], **options)
    optimizer = SOAP([("w", w)])
    state = optimizer.state_tensors()
    with pytest.raises(ValueError, match=r"optimizer state w\.left_basis: nothing saved, \(3, 3\) due"):
        optimizer.load_state_tensors({name: t for name, t in state.items() if name != "w.left_basis"})
    optimizer.step()  # without a gradient nothing moves
    assert torch.equal(w, torch.ones(3, 2))
    assert optimizer.steps == [0]
