"""Parity with TRL 1.16: the same tensors give the same loss and gradients.

Its losses are methods of trainers, called here on an object that holds the few settings they read, with log-probabilities in
place of a model. Not in TRL, or only inside a method that also generates, and so checked elsewhere from the papers: PPO,
GSPO's and DAPO's names (they are settings there), KL k1, the verifier; group advantages are compared with TRL's `nanstd`
and the formula around it.
"""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from graft.finetune.align.dpo import dpo_loss
from graft.finetune.align.grpo import group_advantages, importance_weights, policy_loss
from graft.finetune.align.kto import kto_kl, kto_loss
from graft.finetune.align.orpo import orpo_loss
from graft.finetune.align.reward_model import bradley_terry_loss
from graft.finetune.align.simpo import simpo_loss

pytest.importorskip("trl", minversion="1.16")
pytestmark = pytest.mark.slow

B, T = 6, 9
TOLERANCE = {"atol": 1e-6, "rtol": 1e-6}  # float32, another order of the same operations


def draw(*shape: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def token_mask() -> torch.Tensor:
    """(B, T): answers of 1 to 9 tokens."""
    return torch.arange(T) < torch.tensor([9, 4, 1, 7, 8, 5])[:, None]


def accelerator() -> SimpleNamespace:
    def same(x, *args, **options):
        return x

    return SimpleNamespace(
        device=torch.device("cpu"),
        num_processes=1,
        gather=same,
        gather_for_metrics=same,
        reduce=same,
        sync_gradients=True,
    )


def trainer(**settings) -> SimpleNamespace:
    """What every loss method reads, and the settings of one."""
    return SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=accelerator(),
        aux_loss_enabled=False,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        **settings,
    )


def compare(ours: torch.Tensor, trls: torch.Tensor, leaves: list[torch.Tensor]) -> None:
    torch.testing.assert_close(ours, trls, **TOLERANCE)
    for a, b in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(trls, leaves), strict=True):
        assert b.any()
        torch.testing.assert_close(a, b, **TOLERANCE)


def outputs(logps: torch.Tensor) -> SimpleNamespace:
    """A model's outputs with TRL's fused head; what only feeds its metrics is zero."""
    nothing = torch.zeros_like(logps)
    return SimpleNamespace(log_probs=logps, entropy=nothing, mean_logits=nothing, is_top1=nothing.bool())


@pytest.mark.parametrize(
    ("kind", "smoothing"), [("sigmoid", 0.0), ("ipo", 0.0), ("hinge", 0.0), ("robust", 0.0), ("robust", 0.2)]
)
def test_dpo(kind, smoothing):
    from trl.trainer.dpo_trainer import DPOTrainer

    mask = torch.cat([token_mask(), token_mask().flip(0)])  # (2 B, T) chosen, then rejected
    logps = (draw(2 * B, T, seed=0).sub(1) * mask).requires_grad_()
    ref = (draw(2 * B, T, seed=1).sub(1) * mask).sum(1)
    settings = trainer(
        ld_alpha=None, precompute_ref_logps=True, f_divergence_type="reverse_kl", loss_types=[kind], loss_weights=[1.0],
        beta=0.3, label_smoothing=smoothing, use_weighting=False,
    )  # fmt: skip
    inputs = {
        "completion_mask": torch.nn.functional.pad(mask.long(), (1, 0)),
        "input_ids": torch.zeros(2 * B, T + 1, dtype=torch.int64),
        "attention_mask": torch.ones(2 * B, T + 1, dtype=torch.int64),
        "ref_chosen_logps": ref[:B],
        "ref_rejected_logps": ref[B:],
    }
    trls = DPOTrainer._compute_loss(settings, lambda **options: outputs(logps), inputs, False)
    lengths = mask.sum(1) if kind == "ipo" else torch.ones(2 * B)
    policy, reference = logps.sum(1) / lengths, ref / lengths
    ours = dpo_loss(
        policy[:B], policy[B:], reference[:B], reference[B:], beta=0.3, kind=kind, label_smoothing=smoothing
    )
    compare(ours, trls, [logps])


def test_conservative_dpo_and_simpo():
    """TRL's label smoothing of the sigmoid loss is in its CPO trainer, whose margin takes the place of DPO's here."""
    from trl.experimental.cpo.cpo_trainer import CPOTrainer

    chosen, rejected = draw(B, seed=0).requires_grad_(), draw(B, seed=1).requires_grad_()
    ref = draw(B, seed=2), draw(B, seed=3)
    settings = {"alpha": 0.0, "beta": 0.3, "label_smoothing": 0.2, "simpo_gamma": 0.5}
    losses, _, _ = CPOTrainer.cpo_loss(trainer(loss_type="sigmoid", **settings), chosen - ref[0], rejected - ref[1])
    compare(dpo_loss(chosen, rejected, *ref, beta=0.3, label_smoothing=0.2), losses.mean(), [chosen, rejected])
    settings |= {"label_smoothing": 0.0, "beta": 2.5}
    losses, _, _ = CPOTrainer.cpo_loss(trainer(loss_type="simpo", **settings), chosen, rejected)
    compare(simpo_loss(chosen, rejected, beta=2.5, gamma=0.5), losses.mean(), [chosen, rejected])


def test_orpo():
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    chosen = (-draw(B, seed=0).exp()).requires_grad_()
    rejected = (-draw(B, seed=1).exp()).requires_grad_()
    nll = {"tokens": lambda: -(chosen * torch.arange(1, B + 1)).sum() / 21, "pairs": lambda: -chosen.mean()}
    for name, cross_entropy in nll.items():
        losses, *_ = ORPOTrainer.odds_ratio_loss(trainer(beta=0.4), chosen, rejected)
        ours = orpo_loss(chosen, rejected, beta=0.4, nll=None if name == "pairs" else cross_entropy())
        compare(ours, cross_entropy() - losses.mean(), [chosen, rejected])


@pytest.mark.parametrize("shift", [1.0, -1.0])  # of the mismatched answers: a positive KL, and one clamped to 0
def test_kto(shift):
    from trl.trainer.kto_trainer import KTOTrainer

    labels = torch.tensor([True, False, False, True, True, False])
    logps = (draw(B, T, seed=0) * token_mask()).requires_grad_()
    ref, mismatched, ref_mismatched = draw(B, seed=1), draw(B, seed=2) + shift, draw(B, seed=3)
    settings = trainer(
        beta=0.3, loss_type="kto", precompute_ref_logps=True, calculate_KL=True, desirable_weight=1.3, undesirable_weight=0.7,
        _compute_kl_logps=lambda model, batch: mismatched,
    )  # fmt: skip
    inputs = {
        "label": labels,
        "completion_mask": torch.nn.functional.pad(token_mask().long(), (1, 0)),
        "input_ids": torch.zeros(B, T + 1, dtype=torch.int64),
        "attention_mask": torch.ones(B, T + 1, dtype=torch.int64),
        "ref_logps": ref,
        "ref_KL_logps": ref_mismatched,
    }
    trls = KTOTrainer._compute_loss(settings, lambda **options: outputs(logps), inputs, False)
    kl = kto_kl(mismatched, ref_mismatched)
    assert (float(kl) > 0) == (shift > 0)
    ours = kto_loss(logps.sum(1), ref, labels, kl, beta=0.3, desirable_weight=1.3, undesirable_weight=0.7)
    compare(ours, trls, [logps])


def trl_policy_loss(logp, old, ref, advantages, mask, *, weights=None, **settings) -> torch.Tensor:
    """GRPOTrainer's loss method on log-probabilities."""
    from trl.trainer.grpo_trainer import GRPOTrainer

    defaults = {
        "loss_type": "grpo", "importance_sampling_level": "token", "beta": 0.0, "epsilon_low": 0.2, "epsilon_high": 0.2,
        "max_completion_length": 16, "top_entropy_quantile": 1.0, "off_policy_mask_threshold": None,
        "_entropy_bonus_enabled": False, "current_gradient_accumulation_steps": 1,
        "use_vllm": weights is not None, "vllm_importance_sampling_correction": True,
    }  # fmt: skip
    corrected = settings.pop("corrected", False)
    self = trainer(**defaults | settings)
    self.args = SimpleNamespace(delta=None, use_bias_correction_kl=corrected, steps_per_generation=1)
    self._get_per_token_logps_and_entropies = lambda *args, **options: (logp, torch.zeros_like(logp), None)
    nothing = torch.zeros(B, 1, dtype=torch.int64)
    inputs = {
        "prompt_ids": nothing, "prompt_mask": nothing, "completion_ids": mask.long(), "completion_mask": mask.long(),
        "advantages": advantages, "old_per_token_logps": old, "ref_per_token_logps": ref,
        "num_items_in_batch": mask.sum(), "importance_sampling_ratio": weights,
    }  # fmt: skip
    return GRPOTrainer._compute_loss(self, None, inputs)


KINDS = {
    "grpo": ({"kind": "grpo"}, {"loss_type": "grpo"}),
    "token": ({"kind": "grpo", "normalize": "token"}, {"loss_type": "bnpo"}),
    "dr_grpo": ({"kind": "dr_grpo", "normalize": "constant:16"}, {"loss_type": "dr_grpo"}),
    "dapo": ({"kind": "dapo", "clip_high": 0.28}, {"loss_type": "dapo", "epsilon_high": 0.28}),
    "gspo": ({"kind": "gspo"}, {"loss_type": "grpo", "importance_sampling_level": "sequence"}),
    "cispo": ({"kind": "cispo", "clip_high": 0.5}, {"loss_type": "cispo", "epsilon_high": 1.5}),
}


@pytest.mark.parametrize("kl", [None, "k3", "k3_corrected"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_policy_loss(name, weighted, kl):
    ours, trls = KINDS[name]
    mask = token_mask()
    logp = draw(B, T, seed=0).sub(2).requires_grad_()
    old = logp.detach() + draw(B, T, seed=1, scale=0.4)
    ref, advantages = logp.detach() + draw(B, T, seed=2, scale=0.4), draw(B, seed=3)
    weights = draw(B, T, seed=4, scale=0.3).exp() if weighted else None
    kl_coef = 0.2 if kl else 0.0
    loss, figures = policy_loss(
        logp,
        old,
        advantages,
        mask,
        weights=weights,
        kl_coef=kl_coef,
        ref_logp=ref if kl else None,
        kl=kl or "k3",
        **ours,
    )
    expected = trl_policy_loss(
        logp, old, ref, advantages, mask, weights=weights, beta=kl_coef, corrected=kl == "k3_corrected", **trls
    )
    assert float(figures["clipped_high"]) > 0  # the case would tell little if nothing were clipped
    compare(loss, expected, [logp])


def test_truncated_answers():
    """A row without a token counts among the rows of the mean there too."""
    mask = token_mask()
    mask[3] = False
    logp = draw(B, T, seed=0).sub(2).requires_grad_()
    old, advantages = logp.detach() + draw(B, T, seed=1, scale=0.4), draw(B, seed=3)
    for name in ("grpo", "gspo", "dr_grpo"):
        ours, trls = KINDS[name]
        expected = trl_policy_loss(logp, old, None, advantages, mask, **trls)
        compare(policy_loss(logp, old, advantages, mask, **ours)[0], expected, [logp])


def test_group_advantages():
    """TRL's standard deviation, and its formula with its eps."""
    from trl.trainer.utils import nanstd

    rewards = draw(12, seed=0)
    groups = rewards.view(-1, 4)
    centred = rewards - groups.mean(1).repeat_interleave(4)
    want = centred / (nanstd(groups, dim=1).repeat_interleave(4) + 1e-4)
    torch.testing.assert_close(group_advantages(rewards, 4, eps=1e-4), want, **TOLERANCE)
    torch.testing.assert_close(group_advantages(rewards, 4, normalize_std=False), centred, **TOLERANCE)


@pytest.mark.parametrize("margin", [False, True])
def test_reward_model(margin):
    from trl.trainer.reward_trainer import RewardTrainer

    scores = draw(2 * B, 1, seed=0).requires_grad_()
    gap = draw(B, seed=1).abs() if margin else None
    self = trainer(args=SimpleNamespace(center_rewards_coefficient=0.1))
    inputs = {"attention_mask": torch.ones(2 * B, 3)} | ({"margin": gap} if margin else {})

    def model(use_cache, attention_mask, margin=None):
        return SimpleNamespace(logits=scores)

    trls = RewardTrainer.compute_loss(self, model, inputs)
    flat = scores.squeeze(1)
    compare(bradley_terry_loss(flat[:B], flat[B:], margin=gap, center=0.1), trls, [scores])


def test_importance_weights_are_what_the_sampler_differs_by():
    """Truncation and dropping as TRL's modes token_truncate and token_mask write them."""
    old, sampler, mask = draw(B, T, seed=0), draw(B, T, seed=1), token_mask()
    ratio = ((old - sampler) * mask).exp()
    torch.testing.assert_close(importance_weights(old, sampler, mask, cap=1.5), ratio.clamp(max=1.5), **TOLERANCE)
    dropped = importance_weights(old, sampler, mask, cap=1.5, drop=True)
    torch.testing.assert_close(dropped, ratio.masked_fill(ratio > 1.5, 0.0), **TOLERANCE)


def test_log_probabilities_and_entropies():
    """TRL's `selective_log_softmax` and `entropy_from_logits` on whole logits."""
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    from graft.finetune.align.logprobs import head_logprobs

    head = torch.nn.Linear(8, 50)
    hidden, labels = draw(B, 8, seed=0, scale=3.0), torch.arange(B)
    logp, entropy = head_logprobs(head, hidden, labels, n_vocab=50)
    torch.testing.assert_close(logp, selective_log_softmax(head(hidden), labels), **TOLERANCE)
    torch.testing.assert_close(entropy, entropy_from_logits(head(hidden)), **TOLERANCE)
