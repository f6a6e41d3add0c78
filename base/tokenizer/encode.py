"""Words to ids by merge rank, and back."""

from collections.abc import Sequence

import numpy as np

from . import reference
from .definition import Definition


class Encoder:
    def __init__(self, definition: Definition):
        self.definition = definition
        self.id_of = {token: index for index, token in definition.vocab.items()}
        self.ranks = {pair: rank for rank, pair in enumerate(definition.merges)}
        self.cache: dict[str, list[int]] = {}

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Plain texts -> all their ids in a row (int32), and where each text's ids end (int64)."""
        ids: list[int] = []
        ends = []
        for text in texts:
            pieces = [text]
            for pattern in self.definition.splits:
                pieces = [word for piece in pieces for word in reference.split_words(piece, pattern)]
            for word in pieces:
                if word not in self.cache:
                    raw = word.encode()
                    if self.definition.ignore_merges and raw in self.id_of:
                        self.cache[word] = [self.id_of[raw]]
                    else:
                        self.cache[word] = [self.id_of[s] for s in reference.encode_word(raw, self.ranks)]
                ids += self.cache[word]
            ends.append(len(ids))
        return np.array(ids, np.int32), np.array(ends, np.int64)
