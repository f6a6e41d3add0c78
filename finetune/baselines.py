"""What a task asks of a reader who can't read: the commonest label, and labels told by single words."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence


def majority_label(labels: Sequence[str]) -> str:
    """The commonest label, of equals the first in the alphabet."""
    counts = Counter(labels)
    return min(counts, key=lambda label: (-counts[label], label))


class NaiveBayes:
    """Multinomial naive Bayes over words, add-one smoothed (Manning et al. 2008, "Introduction to IR", section 13.2).

    A label's score is log p(label) + sum over words of log p(word | label); words that training never saw don't count.
    """

    def __init__(self, texts: Sequence[str], labels: Sequence[str]) -> None:
        if not texts or len(texts) != len(labels):
            raise ValueError(
                f"{len(texts)} texts and {len(labels)} labels; give one label for each of at least one text"
            )
        self.words: dict[str, Counter[str]] = defaultdict(Counter)
        for text, label in zip(texts, labels, strict=True):
            self.words[label].update(_words(text))
        self.known = set().union(*self.words.values())
        counts = Counter(labels)
        self.log_prior = {label: math.log(counts[label] / len(labels)) for label in sorted(counts)}

    def predict(self, text: str) -> str:
        """The label of the highest score, of equals the first in the alphabet."""
        return max(self.log_prior, key=lambda label: self._score(text, label))

    def _score(self, text: str, label: str) -> float:
        counts = self.words[label]
        total = counts.total() + len(self.known)
        seen = (word for word in _words(text) if word in self.known)
        return self.log_prior[label] + sum(math.log((counts[word] + 1) / total) for word in seen)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
