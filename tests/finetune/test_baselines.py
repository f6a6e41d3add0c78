"""Baselines without a model: worked by hand."""

import math

import pytest

from graft.finetune.baselines import NaiveBayes, majority_label


def test_the_commonest_label() -> None:
    assert majority_label(["b", "a", "b"]) == "b"
    assert majority_label(["b", "a"]) == "a"


def test_naive_bayes_by_hand() -> None:
    """Worked by hand, the example of Manning et al. 2008, section 13.2, table 13.1: p(c | d5) is proportional to
    3/4 (3/7)^3 1/14 1/14 = 0.0003, p(not c | d5) to 1/4 (2/9)^3 2/9 2/9 = 0.0001."""
    texts = ["Chinese Beijing Chinese", "Chinese Chinese Shanghai", "Chinese Macao", "Tokyo Japan Chinese"]
    model = NaiveBayes(texts, ["c", "c", "c", "not c"])
    test = "Chinese Chinese Chinese Tokyo Japan"
    assert math.exp(model._score(test, "c")) == pytest.approx(3 / 4 * (3 / 7) ** 3 / 14 / 14)
    assert math.exp(model._score(test, "not c")) == pytest.approx(1 / 4 * (2 / 9) ** 3 * (2 / 9) ** 2)
    assert model.predict(test) == "c"
    assert model.predict("tokyo, JAPAN. unheard") == "not c"
    with pytest.raises(ValueError, match="0 texts and 1 labels"):
        NaiveBayes([], ["a"])
