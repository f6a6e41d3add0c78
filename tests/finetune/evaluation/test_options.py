"""Choices that contradict each other or don't exist are one line each."""

from typing import Any

import pytest

from graft.finetune.evaluation.options import EvalOptions


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "best"}, "--score 'best' is unknown; choose exact, likelihood"),
        ({"on_too_long": "cut"}, "--on-too-long 'cut' is unknown; choose error, drop"),
        ({"metrics": ("rouge",)}, "--metric 'rouge' is unknown; choose chrf, bleu"),
        ({"n_samples": -1}, "--samples -1 must be >= 0"),
        ({"temperature": 0.5}, "--temperature is about several samples a record; add --samples N"),
        ({"top_p": 0.5}, "--top-p is about several samples a record"),
        ({"seed": 1}, "--seed is about several samples a record"),
        ({"verify": "number"}, "--verify is about several samples a record"),
        ({"batch_size": 0}, "--batch-size 0 must be >= 1"),
        ({"max_new_tokens": 0}, "--max-new-tokens 0 must be >= 1"),
        (
            {"max_new_tokens": 4, "score": "likelihood"},
            "--max-new-tokens is about answers and --score likelihood writes",
        ),
        ({"pass_k": (1,)}, "--pass-k is about several samples a record; add --samples N"),
        ({"n_samples": 4, "pass_k": (5,)}, "--pass-k 5 must lie between 1 and --samples 4"),
        ({"n_samples": 4, "score": "likelihood"}, "--samples draws answers and --score likelihood writes none"),
        ({"n_samples": 4, "temperature": 0.0}, "--temperature 0 draws the same answer each time"),
        ({"n_samples": 4, "top_p": 2.0}, r"top_p=2.0 must lie in \(0, 1\]"),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EvalOptions(**options)


def test_the_ks_of_pass_at_k() -> None:
    """Worked by hand: powers of two up to the number of samples, unless they are named."""
    assert EvalOptions(n_samples=10).ks == (1, 2, 4, 8)
    assert EvalOptions(n_samples=8).ks == (1, 2, 4, 8)
    assert EvalOptions(n_samples=8, pass_k=(3,)).ks == (3,)
    assert EvalOptions().ks == ()
