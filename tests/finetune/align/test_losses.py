"""Worked by hand (each docstring holds the arithmetic) and laws: the preference losses, reward models, GRPO's kinds, PPO.

The same losses against TRL's are in test_trl.py. s is the logistic function: s(log 3) = 3/4 and s(-log 3) = 1/4.
"""

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from graft.finetune.align.dpo import dpo_loss
from graft.finetune.align.grpo import (
    group_advantages,
    groups_without_signal,
    importance_weights,
    mask_truncated,
    n_averaged,
    policy_loss,
)
from graft.finetune.align.kto import kto_kl, kto_loss
from graft.finetune.align.orpo import log_odds, orpo_loss
from graft.finetune.align.ppo import advantages_and_returns, token_rewards, value_loss, whiten
from graft.finetune.align.reward_model import ScalarHead, bradley_terry_loss, last_scores, verifier_loss
from graft.finetune.align.simpo import simpo_loss

LOG2, LOG3, LOG4_3, LOG4 = (math.log(x) for x in (2, 3, 4 / 3, 4))


def T(*values: float) -> torch.Tensor:
    return torch.tensor(values)


def close(got: torch.Tensor, want: float) -> None:
    torch.testing.assert_close(got, torch.tensor(want))


# --- preferences ---------------------------------------------------------------------------------------------------


def test_dpo():
    """h = (-2 - -2.5) - (-3 - -2.5) = 1. With beta = log 3: -log s(log 3) = log 4/3; swapped -log s(-log 3) = log 4.

    e = 1/4: 3/4 log 4/3 + 1/4 log 4; robust (3/4 log 4/3 - 1/4 log 4) / (1/2). beta = 1/4: ipo (1 - 2)^2 = 1, hinge 1 - 1/4.
    d sigmoid / d policy_chosen = -beta (1 - 3/4) = -log(3) / 4.
    """
    logps = [T(-2.0).requires_grad_(), T(-3.0), T(-2.5), T(-2.5)]
    loss = dpo_loss(*logps, beta=LOG3)
    close(loss, LOG4_3)
    close(torch.autograd.grad(loss, logps[0])[0][0], -LOG3 / 4)
    close(dpo_loss(*logps, beta=LOG3, label_smoothing=0.25), 0.75 * LOG4_3 + 0.25 * LOG4)
    close(dpo_loss(*logps, beta=LOG3, kind="robust", label_smoothing=0.25), 2 * (0.75 * LOG4_3 - 0.25 * LOG4))
    close(dpo_loss(*logps, beta=0.25, kind="ipo"), 1.0)
    close(dpo_loss(*logps, beta=0.25, kind="hinge"), 0.75)


def test_dpo_mean_and_start():
    """Law: the mean over pairs, not their sum; log 2 where policy and reference agree; robust without noise is sigmoid."""
    a, b = [T(-2.0), T(-3.0), T(-2.5), T(-2.5)], [T(-1.0), T(-4.0), T(-1.5), T(-2.0)]
    both = [torch.cat(pair) for pair in zip(a, b, strict=True)]
    for kind in ("sigmoid", "ipo", "robust", "hinge"):
        halves = dpo_loss(*a, beta=0.3, kind=kind), dpo_loss(*b, beta=0.3, kind=kind)
        torch.testing.assert_close(dpo_loss(*both, beta=0.3, kind=kind), sum(halves) / 2)
    close(dpo_loss(*both[:2], *both[:2], beta=0.1), LOG2)
    torch.testing.assert_close(dpo_loss(*both, beta=0.3, kind="robust"), dpo_loss(*both, beta=0.3))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta": 0.0}, r"beta=0.0 must be > 0; start from 0.1"),
        ({"kind": "ippo"}, r"unknown DPO loss 'ippo'; choose sigmoid, ipo, robust, hinge"),
        ({"label_smoothing": 0.5}, r"label_smoothing=0.5 must lie in \[0, 0.5\)"),
        (
            {"kind": "ipo", "label_smoothing": 0.1},
            r"label_smoothing=0.1 is for sigmoid and robust; the ipo loss has none",
        ),
    ],
)
def test_dpo_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        dpo_loss(*(T(0.0),) * 4, **settings)


def test_kto():
    """beta = log 3, z_0 = 1. Desirable with r = 2: 1 - s(log 3) = 1/4. Undesirable with r = 2: 1 - s(-log 3) = 3/4, weight 2.
    Mean (1/4 + 2 3/4) / 2 = 7/8. Its gradients: -log(3) 3/16 / 2 and +2 log(3) 3/16 / 2."""
    policy = T(-1.0, -3.0).requires_grad_()
    desirable = torch.tensor([True, False])
    loss = kto_loss(policy, T(-3.0, -5.0), desirable, torch.tensor(1.0), beta=LOG3, undesirable_weight=2.0)
    close(loss, 7 / 8)
    torch.testing.assert_close(torch.autograd.grad(loss, policy)[0], T(-LOG3 * 3 / 32, LOG3 * 6 / 32))
    close(kto_kl(T(-1.0, -2.0), T(-2.0, -4.0)), 1.5)
    close(kto_kl(T(-2.0, -4.0), T(-1.0, -2.0)), 0.0)
    assert not kto_kl(policy, T(0.0, 0.0)).requires_grad
    with pytest.raises(ValueError, match=r"beta=-1 must be > 0"):
        kto_loss(policy, policy, desirable, torch.tensor(0.0), beta=-1)
    with pytest.raises(ValueError, match=r"undesirable_weight=-0.5 must be >= 0"):
        kto_loss(policy, policy, desirable, torch.tensor(0.0), undesirable_weight=-0.5)


def test_orpo():
    """p 1/2 and 1/4 have odds 1 and 1/3, a ratio of 3: log 2 + beta log 4/3. With nll = 5: 5 + beta log 4/3."""
    chosen, rejected = T(0.5).log(), T(0.25).log()
    close(orpo_loss(chosen, rejected, beta=0.5), LOG2 + 0.5 * LOG4_3)
    close(orpo_loss(chosen, rejected, beta=0.5, nll=torch.tensor(5.0)), 5 + 0.5 * LOG4_3)
    torch.testing.assert_close(
        log_odds(T(1e-9, 0.1, 0.9, 0.999).log()), torch.logit(T(1e-9, 0.1, 0.9, 0.999)), rtol=1e-4, atol=0
    )
    with pytest.raises(ValueError, match=r"beta=-0.1 must be >= 0"):
        orpo_loss(chosen, rejected, beta=-0.1)


def test_orpo_stays_finite():
    """Law: at p = 1 and at p = 0 (log p = -200) loss and gradient are finite."""
    logp = T(0.0, -200.0).requires_grad_()
    loss = orpo_loss(logp, logp.flip(0))
    assert torch.isfinite(loss)
    assert torch.isfinite(torch.autograd.grad(loss, logp)[0]).all()


def test_simpo():
    """Means -1 and -2, beta 2, gamma = 2 - log 3: s(2 - 2 + log 3) = 3/4, loss log 4/3."""
    close(simpo_loss(T(-1.0), T(-2.0), beta=2.0, gamma=2 - LOG3), LOG4_3)
    with pytest.raises(ValueError, match=r"beta=0 must be > 0"):
        simpo_loss(T(-1.0), T(-2.0), beta=0)
    with pytest.raises(ValueError, match=r"gamma=-1 must be >= 0"):
        simpo_loss(T(-1.0), T(-2.0), gamma=-1)


# --- reward models -------------------------------------------------------------------------------------------------


def test_bradley_terry():
    """Scores log 3 and 0: log 4/3. A margin of 2 log 3 makes it -log s(-log 3) = log 4. center: + c (log 3 + 0)^2."""
    chosen, rejected = T(LOG3), T(0.0)
    close(bradley_terry_loss(chosen, rejected), LOG4_3)
    close(bradley_terry_loss(chosen, rejected, margin=T(2 * LOG3)), LOG4)
    close(bradley_terry_loss(chosen, rejected, center=0.5), LOG4_3 + 0.5 * LOG3**2)


def test_verifier():
    """Logit log 3 at two tokens of a right answer: log 4/3 each; at one of a wrong answer: log 4. Mean (2 log 4/3 + log 4) / 3;
    padding holds 100 and weighs nothing."""
    scores = torch.tensor([[100.0, LOG3, LOG3], [100.0, LOG3, 100.0]])
    mask = torch.tensor([[False, True, True], [False, True, False]])
    close(verifier_loss(scores, torch.tensor([True, False]), mask), (2 * LOG4_3 + LOG4) / 3)


def test_heads():
    """Law: the head is one number a position, float32, from its seed; an answer's score is read at its last token."""
    hidden = torch.randn(2, 5, 8, dtype=torch.bfloat16)
    scores = ScalarHead(8, seed=3).bfloat16()(hidden)
    assert scores.shape == (2, 5)
    assert scores.dtype == torch.float32
    assert torch.equal(ScalarHead(8, seed=3).score.weight, ScalarHead(8, seed=3).score.weight)
    assert not torch.equal(ScalarHead(8, seed=3).score.weight, ScalarHead(8, seed=4).score.weight)
    scores = torch.arange(10.0).view(2, 5)
    mask = torch.tensor([[False, True, True, False, False], [False, False, True, False, True]])
    assert last_scores(scores, mask).tolist() == [2.0, 9.0]
    with pytest.raises(ValueError, match="row 1 has no token to read a score at"):
        last_scores(scores, mask & torch.tensor([[True], [False]]))


# --- GRPO ----------------------------------------------------------------------------------------------------------

MASK = torch.tensor([[True, True], [True, False]])  # two answers, of two tokens and of one
ADVANTAGES = T(1.0, -1.0)
LOGP = torch.tensor([[-1.0, -2.0], [-3.0, -9.0]])
RATIO = torch.tensor([[1.5, 1.0], [0.5, 7.0]])  # the last one is padding


def surrogate(**settings):
    logp = LOGP.clone().requires_grad_()
    loss, figures = policy_loss(logp, LOGP - RATIO.log(), ADVANTAGES, MASK, **settings)
    return loss, torch.autograd.grad(loss, logp)[0], figures


def test_grpo():
    """Ratios 1.5, 1 with A = 1 give -min(1.5, 1.2) = -1.2 and -1; 0.5 with A = -1 gives -min(-0.5, -0.8) = 0.8.

    sequence (-2.2 / 2 + 0.8) / 2 = -0.15;  token (-2.2 + 0.8) / 3;  constant:4 -1.4 / (2 4) = -0.175; dr_grpo of itself
    divides by 2 T = 4. Only the second token is not clipped: its gradient is -A r / 2 / 2 = -1/4, or -1/3, or -1/8.
    """
    loss, grad, figures = surrogate()
    close(loss, -0.15)
    torch.testing.assert_close(grad, torch.tensor([[0, -0.25], [0, 0]]))
    close(figures["ratio"], 1.0)
    close(figures["clipped_low"], 1 / 3)
    close(figures["clipped_high"], 1 / 3)
    close(figures["old_kl"], (0.5 - math.log(1.5) + 0 - 0.5 + LOG2) / 3)
    assert "kl" not in figures
    for token_mean in ({"kind": "grpo", "normalize": "token"}, {"kind": "dapo"}):
        loss, grad, _ = surrogate(**token_mean)
        close(loss, -1.4 / 3)
        torch.testing.assert_close(grad, torch.tensor([[0, -1 / 3], [0, 0]]))
    loss, grad, _ = surrogate(kind="dr_grpo", normalize="constant:4")
    close(loss, -0.175)
    torch.testing.assert_close(grad, torch.tensor([[0, -0.125], [0, 0]]))
    close(surrogate(kind="dr_grpo")[0], -0.35)


def test_clip_higher():
    """clip_high = 0.6 lets 1.5 through: -(1.5 + 1) + 0.8 = -1.7, over 3 tokens; its token has gradient -1.5 / 3."""
    loss, grad, figures = surrogate(kind="dapo", clip_high=0.6)
    close(loss, -1.7 / 3)
    torch.testing.assert_close(grad, torch.tensor([[-0.5, -1 / 3], [0, 0]]))
    close(figures["clipped_high"], 0.0)


def test_gspo():
    """The first answer's ratio is sqrt(1.5 1) = 1.2247, clipped at 1.2 (gradient 0); the second's 0.5 at 0.8: (-1.2 + 0.8) / 2.
    With clip_high = 0.3 it is not: (-1.2247 + 0.8) / 2, and each of its tokens has gradient -1.2247 / 2 / 2."""
    loss, grad, _ = surrogate(kind="gspo")
    close(loss, -0.2)
    assert not grad.any()
    loss, grad, _ = surrogate(kind="gspo", clip_high=0.3)
    close(loss, (-math.sqrt(1.5) + 0.8) / 2)
    torch.testing.assert_close(grad, torch.tensor([[1.0, 1.0], [0, 0]]) * -math.sqrt(1.5) / 4)


def test_cispo():
    """Weights min(1.5, 1.2), 1, 0.5 without gradient on -A log pi: -1.2 (-1) - 1 (-2) + 0.5 (-3) = 1.7, over 3 tokens;
    gradients -1.2 / 3, -1 / 3, +0.5 / 3: no token loses its own."""
    loss, grad, figures = surrogate(kind="cispo")
    close(loss, 1.7 / 3)
    torch.testing.assert_close(grad, torch.tensor([[-1.2, -1.0], [0.5, 0.0]]) / 3)
    close(figures["clipped_high"], 1 / 3)
    close(figures["clipped_low"], 0.0)


def test_kl():
    """log ref - log pi = log 2 at every token: k3 = 2 - 1 - log 2; k1 = r (-log 2), in the mean of 1.5, 1, 0.5 that is -log 2.

    On the policy (r = 1) the gradients a token are: k3 -2 + 1 = -1; k1 and corrected k3 those of KL(pi, ref) itself,
    log pi - log ref + 1 and log pi - log ref: -log 2 + 1 and (1 - log 2) - 1 = -log 2.
    """
    k3 = 1 - LOG2
    for kind, want in (("k3", k3), ("k1", -LOG2), ("k3_corrected", k3)):
        ref = LOGP + LOG2
        plain, _, _ = surrogate(normalize="token")
        loss, _, figures = surrogate(normalize="token", kl_coef=0.5, ref_logp=ref, kl=kind)
        close(figures["kl"], want)
        torch.testing.assert_close(loss, plain + 0.5 * want)
    for kind, want in (("k3", -1.0), ("k1", 1 - LOG2), ("k3_corrected", -LOG2)):
        logp = LOGP.clone().requires_grad_()
        loss, _ = policy_loss(
            logp, LOGP, T(0.0, 0.0), MASK, normalize="token", kl_coef=3.0, ref_logp=LOGP + LOG2, kl=kind
        )
        torch.testing.assert_close(torch.autograd.grad(loss, logp)[0], torch.where(MASK, want, 0.0))


def test_padding_weighs_nothing():
    """Law: what stands outside the mask, NaN even, changes neither loss nor gradients, in every kind."""
    for kind in ("grpo", "dr_grpo", "dapo", "gspo", "cispo"):
        results = []
        for junk in (0.0, math.nan, math.inf):
            logp = LOGP.masked_fill(~MASK, junk).requires_grad_()
            old, ref = (LOGP - RATIO.log()).masked_fill(~MASK, junk), (LOGP - 0.5).masked_fill(~MASK, junk)
            loss, figures = policy_loss(logp, old, ADVANTAGES, MASK, kind=kind, kl_coef=0.1, ref_logp=ref)
            results.append(
                torch.cat([loss[None], torch.autograd.grad(loss, logp)[0].flatten(), torch.stack([*figures.values()])])
            )
        for other in results[1:]:
            assert torch.equal(results[0], other)


def test_micro_batches_add_up():
    """Law: the halves' losses, each times n_averaged and divided by the whole batch's, sum to the whole batch's loss."""
    for kind, normalize in (("grpo", "sequence"), ("dapo", "token"), ("dr_grpo", "constant:5"), ("gspo", "sequence")):
        whole = policy_loss(LOGP, LOGP - RATIO.log(), ADVANTAGES, MASK, kind=kind, normalize=normalize)[0]
        parts = 0.0
        for i in (slice(0, 1), slice(1, 2)):
            part, _ = policy_loss(
                LOGP[i], (LOGP - RATIO.log())[i], ADVANTAGES[i], MASK[i], kind=kind, normalize=normalize
            )
            parts = parts + part * n_averaged(MASK[i], normalize)
        torch.testing.assert_close(parts / n_averaged(MASK, normalize), whole)


def test_truncated_answers():
    """The second answer was cut off: only -2.2 / 2 is left, over both answers -0.55, over the tokens that are left -1.1."""
    mask = mask_truncated(MASK, torch.tensor([False, True]))
    assert mask.tolist() == [[True, True], [False, False]]
    for normalize, want in (("sequence", -0.55), ("token", -1.1)):
        close(policy_loss(LOGP, LOGP - RATIO.log(), ADVANTAGES, mask, normalize=normalize)[0], want)
    nothing = policy_loss(LOGP, LOGP, ADVANTAGES, torch.zeros_like(MASK), kind="gspo")
    assert all(float(v) == 0 for v in (nothing[0], *nothing[1].values()))


def test_importance_weights():
    """pi_old / pi_sampler = 3 and 1/2, then 3/2 for the whole answer; capped at 2: 2, 1/2; dropped: 0, 1/2. Padding: 1."""
    old, mask = torch.tensor([[3.0, 0.5, 9.0]]).log(), torch.tensor([[True, True, False]])
    sampler = torch.zeros(1, 3)
    torch.testing.assert_close(importance_weights(old, sampler, mask), torch.tensor([[2.0, 0.5, 1.0]]))
    torch.testing.assert_close(importance_weights(old, sampler, mask, drop=True), torch.tensor([[0.0, 0.5, 1.0]]))
    torch.testing.assert_close(importance_weights(old, sampler, mask, level="sequence"), torch.tensor([[1.5]]))
    weighted, _, _ = surrogate(normalize="token", weights=torch.tensor([[2.0, 1.0], [1.0, 1.0]]))
    close(weighted, (-2.4 - 1 + 0.8) / 3)
    with pytest.raises(ValueError, match=r"cap=0.5 must be >= 1"):
        importance_weights(old, sampler, mask, cap=0.5)


def test_group_advantages():
    """[1, 0, 0, 1]: mean 1/2, standard deviation sqrt(4 1/4 / 3) = 1/sqrt 3, so +-sqrt(3)/2; [5, 5, 5, 5] has no signal;
    [0, 0, 0, 4]: mean 1, standard deviation sqrt((3 + 9) / 3) = 2, so -1/2 and 3/2."""
    rewards = T(1, 0, 0, 1, 5, 5, 5, 5, 0, 0, 0, 4)
    h = math.sqrt(3) / 2
    want = T(h, -h, -h, h, 0, 0, 0, 0, -0.5, -0.5, -0.5, 1.5)
    torch.testing.assert_close(group_advantages(rewards, 4), want, atol=1e-5, rtol=0)  # eps = 1e-6
    centred = group_advantages(rewards, 4, normalize_std=False)
    torch.testing.assert_close(centred, T(0.5, -0.5, -0.5, 0.5, 0, 0, 0, 0, -1, -1, -1, 3))
    assert groups_without_signal(rewards, 4).tolist() == [False, True, False]


@given(st.floats(-1e3, 1e3), st.integers(2, 9), st.sampled_from([torch.float32, torch.float64]))
@example(0.1, 3, torch.float64)  # whose mean is not 0.1
@settings(max_examples=50, deadline=None)
def test_equal_rewards_have_no_advantage(reward, n, dtype):
    """Law: exactly 0, where (r - mean) / (0 + 1e-6) would make the mean's rounding error into a signal."""
    assert not group_advantages(torch.full((2 * n,), reward, dtype=dtype), n).any()


def test_grpo_refuses():
    with pytest.raises(ValueError, match=r"group_size=1 must be >= 2"):
        group_advantages(T(1, 2), 1)
    with pytest.raises(ValueError, match=r"rewards \(3,\) are not whole groups of group_size=2"):
        group_advantages(T(1, 2, 3), 2)
    with pytest.raises(ValueError, match=r"reward 1 is nan; rewards must be finite"):
        group_advantages(T(1, math.nan), 2)
    for change, message in (
        ({"kind": "ppo"}, "unknown policy loss 'ppo'; choose grpo, dr_grpo, dapo, gspo, cispo"),
        ({"normalize": "mean"}, "normalize='mean'; choose sequence, token, or constant:N"),
        ({"normalize": "constant:0"}, "normalize='constant:0'; choose"),
        ({"kl_coef": 0.1}, "kl_coef=0.1 needs ref_logp"),
        ({"kl_coef": -0.1}, "kl_coef=-0.1 must be >= 0"),
        ({"clip_low": -0.2}, "clip_low=-0.2 and clip_high=0.2 must be >= 0"),
        ({"old_logp": LOGP[:, :1]}, r"old_logp has shape \(2, 1\), logp \(2, 2\)"),
        ({"mask": MASK.long()}, "mask has dtype torch.int64; give torch.bool"),
        ({"advantages": T(1, 2, 3)}, r"advantages have shape \(3,\); logp \(2, 2\) takes \(B,\) or \(B, T\)"),
    ):
        given = {"logp": LOGP, "old_logp": LOGP, "advantages": ADVANTAGES, "mask": MASK} | change
        with pytest.raises(ValueError, match=message):
            policy_loss(**given)


# --- PPO -----------------------------------------------------------------------------------------------------------


def test_gae():
    """Rewards 0, 1, values 1/2, 1/4, gamma 1, lam 1/2: delta = (1/4 - 1/2, 1 - 1/4), A_1 = 3/4, A_0 = -1/4 + 3/8 = 1/8;
    returns A + V = 5/8, 1. The second row has the same with a gap between its two tokens and junk around them."""
    nan = math.nan
    rewards = torch.tensor([[0.0, 1.0, nan, nan], [nan, 0.0, nan, 1.0]])
    values = torch.tensor([[0.5, 0.25, nan, nan], [nan, 0.5, nan, 0.25]])
    mask = torch.tensor([[True, True, False, False], [False, True, False, True]])
    advantages, returns = advantages_and_returns(rewards, values, mask, gamma=1.0, lam=0.5)
    torch.testing.assert_close(advantages, torch.tensor([[0.125, 0.75, 0, 0], [0, 0.125, 0, 0.75]]))
    torch.testing.assert_close(returns, torch.tensor([[0.625, 1.0, 0, 0], [0, 0.625, 0, 1.0]]))
    with pytest.raises(ValueError, match=r"gamma=1.5 must lie in \[0, 1\]"):
        advantages_and_returns(rewards, values, mask, gamma=1.5)


@pytest.mark.parametrize(("gamma", "lam"), [(0.9, 0.8), (1.0, 0.95), (0.99, 0.0), (1.0, 1.0)])
def test_gae_is_its_definition(gamma, lam):
    """Parity with the double sum of equation 16, A_t = sum_l (gamma lam)^l delta_(t+l), in plain Python; lam = 1 is the
    discounted return minus the value. (TRL 1.16 has no PPO to compare with.)"""
    g = torch.Generator().manual_seed(0)
    rewards, values = (torch.randn(3, 7, generator=g, dtype=torch.float64) for _ in range(2))
    lengths = [7, 4, 1]
    mask = torch.arange(7) < torch.tensor(lengths)[:, None]
    got, returns = advantages_and_returns(rewards, values, mask, gamma=gamma, lam=lam)
    for b, n in enumerate(lengths):
        r, v = rewards[b, :n].tolist(), [*values[b, :n].tolist(), 0.0]
        delta = [r[t] + gamma * v[t + 1] - v[t] for t in range(n)]
        for t in range(n):
            want = sum((gamma * lam) ** i * delta[t + i] for i in range(n - t))
            assert float(got[b, t]) == pytest.approx(want, abs=1e-12)
            assert float(returns[b, t]) == pytest.approx(want + v[t], abs=1e-12)
            if lam == 1:
                assert float(returns[b, t]) == pytest.approx(sum(gamma**i * r[t + i] for i in range(n - t)), abs=1e-12)


def test_token_rewards():
    """log pi - log ref = 1 and -2, kl_coef 1/10: -0.1, 0.2, and the score 5 at the last token."""
    mask = torch.tensor([[False, True, True, False]])
    got = token_rewards(T(5.0), torch.tensor([[9.0, 1, 0, 9]]), torch.tensor([[0.0, 0, 2, 0]]), mask, kl_coef=0.1)
    torch.testing.assert_close(got, torch.tensor([[0, -0.1, 5.2, 0]]))
    with pytest.raises(ValueError, match="answer 0 has no token to carry its score"):
        token_rewards(T(5.0), got, got, torch.zeros_like(mask), kl_coef=0.1)


def test_value_loss():
    """Value 1 from an old 1/2, return 2: errors 1 and, held at 0.7, 1.69: half the larger 0.845; unclipped 1/2. Value 0.6:
    1.96 both ways, 0.98. The clipped one's gradient is 0, the other's V - R = -1.4, halved by the mean over two tokens."""
    values = torch.tensor([[1.0, 0.6, math.nan]]).requires_grad_()
    old, returns = torch.full((1, 3), 0.5), torch.full((1, 3), 2.0)
    mask = torch.tensor([[True, True, False]])
    loss = value_loss(values, old, returns, mask)
    close(loss, (0.845 + 0.98) / 2)
    torch.testing.assert_close(torch.autograd.grad(loss, values)[0][:, :2], torch.tensor([[0.0, -0.7]]))
    close(value_loss(values, old, returns, mask, clip=None), (0.5 + 0.98) / 2)
    with pytest.raises(ValueError, match=r"clip=0 must be > 0; None switches it off"):
        value_loss(values, old, returns, mask, clip=0)


def test_whiten():
    """1 and 3: mean 2, standard deviation 1."""
    got = whiten(torch.tensor([[1.0, 3.0, 99.0]]), torch.tensor([[True, True, False]]))
    torch.testing.assert_close(got, torch.tensor([[-1.0, 1.0, 0.0]]))


def test_ppo_is_the_token_surrogate():
    """PPO's equation 7 with an advantage a token: ratios 1.5, 1, 0.5 and A = 2, -1, 1: -min(3, 2.4), 1, -min(0.5, 0.8)."""
    advantages = torch.tensor([[2.0, -1.0], [1.0, 0.0]])
    loss, _ = policy_loss(LOGP, LOGP - RATIO.log(), advantages, MASK, normalize="token")
    close(loss, (-2.4 + 1 - 0.5) / 3)
