"""Figures from answers and losses, each with the interval that its number of records gives."""

import math
from collections import Counter
from collections.abc import Sequence

from ...base.evaluate import bits_per_byte
from ...base.extras import needs

Z95 = 1.959964  # the normal distribution's 97.5% point


def f1_scores(truth: Sequence[str], predicted: Sequence[str]) -> dict[str, float]:
    """F1 = 2 TP / (2 TP + FP + FN) of each label that occurs in the truth."""
    hits = Counter(t for t, p in zip(truth, predicted, strict=True) if t == p)
    in_truth, in_predicted = Counter(truth), Counter(predicted)
    return {label: 2 * hits[label] / (in_truth[label] + in_predicted[label]) for label in sorted(in_truth)}


def wilson_interval(n_correct: int, n: int, *, z: float = Z95) -> tuple[float, float]:
    """The 95% interval of a share of n trials (Wilson 1927): right also near 0 and 1. Raises ValueError for n < 1.

    Of 10 right in 10 trials: 0.722 to 1.
    """
    if n < 1 or not 0 <= n_correct <= n:
        raise ValueError(f"{n_correct} of {n} is no share; n must be >= 1")
    share = n_correct / n
    middle = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low, high = (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)
    return (0.0 if n_correct == 0 else low), (1.0 if n_correct == n else high)


def share(name: str, right: Sequence[bool]) -> dict[str, float]:
    """{name, name_low, name_high}: the share that is right, and its 95% interval."""
    low, high = wilson_interval(sum(right), len(right))
    return {name: sum(right) / len(right), f"{name}_low": low, f"{name}_high": high}


def mean_interval(values: Sequence[float], *, z: float = Z95) -> tuple[float, float, float]:
    """(mean, low, high): the 95% interval of a mean by its standard error; one value has no spread, so low = high."""
    n = len(values)
    mean = sum(values) / n
    if n < 2:
        return mean, mean, mean
    half = z * math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1) / n)
    return mean, mean - half, mean + half


def bounded_mean(name: str, values: Sequence[float]) -> dict[str, float]:
    """{name, name_low, name_high} of values in [0, 1], such as each problem's pass@k."""
    mean, low, high = mean_interval(values)
    return {name: mean, f"{name}_low": max(0.0, low), f"{name}_high": min(1.0, high)}


def text_figures(names: Sequence[str], truth: Sequence[str], written: Sequence[str]) -> dict[str, float | str]:
    """chrF (Popović 2015) and BLEU (Papineni et al. 2002) of all answers together, 0 to 100, as sacrebleu computes them.

    Needs sacrebleu (the extra `metrics`), whose signature is part of the result: figures with another one don't compare.
    """
    figures: dict[str, float | str] = {}
    if not names:
        return figures
    with needs("metrics", "a score by chrF or BLEU"):
        from sacrebleu.metrics.bleu import BLEU
        from sacrebleu.metrics.chrf import CHRF
    for name in names:
        metric = {"chrf": CHRF, "bleu": BLEU}[name]()
        figures[name] = metric.corpus_score(list(written), [list(truth)]).score
        figures[f"{name}_signature"] = str(metric.get_signature())
    return figures


def loss_figures(loss: float, n_labels: int, n_bytes: int) -> dict[str, float]:
    """Loss in nats a token, its exponential, and bits a byte of what the labels spell."""
    perplexity = math.exp(min(loss, 700))  # beyond, a float overflows
    return {
        "loss": loss,
        "perplexity": perplexity,
        "bits_per_byte": bits_per_byte(loss, n_tokens=n_labels, n_bytes=n_bytes),
    }
