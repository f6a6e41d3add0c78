"""Figures by hand: F1, intervals; chrF and BLEU by hand and as sacrebleu's command line gives them."""

import math

import pytest

from graft.finetune.evaluation.metrics import (
    bounded_mean,
    f1_scores,
    mean_interval,
    share,
    text_figures,
    wilson_interval,
)


def test_f1_by_hand() -> None:
    """Worked by hand: spam: 2 hits of 3, 1 false alarm: F1 = 4 / (3 + 3); ham: 1 hit of 2, 1 false: 2 / (2 + 2); a label
    that nobody predicts has 0, and a predicted word that is no label counts for none."""
    truth = ["spam", "spam", "spam", "ham", "ham", "odd"]
    predicted = ["spam", "spam", "ham", "spam", "ham", "what?"]
    scores = f1_scores(truth, predicted)
    assert scores == {"ham": pytest.approx(2 / 4), "odd": 0, "spam": pytest.approx(4 / 6)}
    assert list(scores) == sorted(scores)


def test_wilsons_interval_by_hand() -> None:
    """Worked by hand, z = 1.96: of 10 right in 10, low = n / (n + z^2) = 10 / 13.8415 and high 1; of 5 in 10 the middle is
    0.5 and half = z sqrt(0.25 / 10 + z^2 / 400) / (1 + z^2 / 10)."""
    assert wilson_interval(10, 10) == pytest.approx((10 / 13.8415, 1), abs=1e-4)
    assert wilson_interval(0, 10) == pytest.approx((0, 1 - 10 / 13.8415), abs=1e-4)
    half = 1.959964 * math.sqrt(0.025 + 1.959964**2 / 400) / (1 + 1.959964**2 / 10)
    assert wilson_interval(5, 10) == pytest.approx((0.5 - half, 0.5 + half), abs=1e-9)
    with pytest.raises(ValueError, match="0 of 0 is no share"):
        wilson_interval(0, 0)


def test_intervals_of_means_by_hand() -> None:
    """Worked by hand: 0, 0, 1, 1 have mean 1/2 and variance 1/3, so the standard error is sqrt(1/12) = 0.288675; a share of
    probabilities ends at 0 and 1; one value has no spread."""
    mean, low, high = mean_interval([0.0, 0.0, 1.0, 1.0])
    half = 1.959964 * math.sqrt(1 / 12)
    assert (mean, low, high) == pytest.approx((0.5, 0.5 - half, 0.5 + half))
    assert bounded_mean("p", [0.0, 0.0, 1.0, 1.0]) == pytest.approx({"p": 0.5, "p_low": 0.0, "p_high": 1.0})
    assert mean_interval([0.25]) == (0.25, 0.25, 0.25)
    assert share("acc", [True, False]) == {
        "acc": 0.5, "acc_low": wilson_interval(1, 2)[0], "acc_high": wilson_interval(1, 2)[1],
    }  # fmt: skip


def test_bleu_and_chrf() -> None:
    """Worked by hand: "a b c d e" for "a b c d f" has 4/5, 3/4, 2/3, 1/2 of its n-grams right, no brevity penalty: BLEU is
    their geometric mean, 0.2^(1/4); equal texts have 100 each; the signature says how it was computed."""
    pytest.importorskip("sacrebleu")
    figures = text_figures(["chrf", "bleu"], ["a b c d f"], ["a b c d e"])
    assert figures["bleu"] == pytest.approx(100 * 0.2**0.25)
    assert 0 < float(figures["chrf"]) < 100
    assert "nrefs:1" in str(figures["bleu_signature"])
    assert "nc:6" in str(figures["chrf_signature"])
    same = text_figures(["chrf", "bleu"], ["ein Hund bellt hier laut"] * 2, ["ein Hund bellt hier laut"] * 2)
    assert (same["chrf"], same["bleu"]) == (pytest.approx(100), pytest.approx(100))
    assert text_figures([], ["a"], ["b"]) == {}
