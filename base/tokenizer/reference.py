"""Byte-level BPE in its plainest form (Sennrich et al. 2016, arXiv:1508.07909; bytes as in GPT-2).

`regex` and dictionaries, no speed: read this first. The tests hold the fast path (scan.py, merges.py, encode.py) to it.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import pairwise

import regex

Pair = tuple[bytes, bytes]


def split_words(text: str, pattern: str) -> Iterator[str]:
    """Cut text into words: the pattern's matches, and whatever lies between two matches, so that nothing is lost."""
    done = 0
    for match in regex.finditer(pattern, text):
        if match.start() > done:
            yield text[done : match.start()]
        yield match.group()
        done = match.end()
    if done < len(text):
        yield text[done:]


def split_at_tokens(text: str, tokens: Iterable[str]) -> list[str]:
    """Cut text at special tokens: even places hold plain text, odd places the tokens. Longest match first."""
    tokens = sorted(tokens, key=len, reverse=True)
    return regex.split("(" + "|".join(map(regex.escape, tokens)) + ")", text) if tokens else [text]


def count_words(texts: Iterable[str], pattern: str, special_tokens: Iterable[str] = ()) -> Counter[bytes]:
    """How often each word occurs; special tokens are left out and nothing crosses them."""
    counts: Counter[bytes] = Counter()
    for text in texts:
        for part in split_at_tokens(text, special_tokens)[::2]:
            counts.update(word.encode() for word in split_words(part, pattern))
    return counts


def apply_merge(symbols: list[bytes], pair: Pair) -> list[bytes]:
    """Join each occurrence of the pair, from the left: merging (a, a) in a a a gives aa a."""
    out: list[bytes] = []
    at = 0
    while at < len(symbols):
        joined = tuple(symbols[at : at + 2]) == pair
        out.append(pair[0] + pair[1] if joined else symbols[at])
        at += 2 if joined else 1
    return out


def train(counts: Counter[bytes], n_merges: int) -> list[Pair]:
    """The first n_merges merges: most frequent pair first, among equals the lexicographically greater pair of bytes.

    Stops early when no word has two symbols left.
    """
    words = {word: [bytes([byte]) for byte in word] for word in counts}
    merges: list[Pair] = []
    while len(merges) < n_merges:
        pairs: Counter[Pair] = Counter()
        for word, symbols in words.items():
            for pair in pairwise(symbols):
                pairs[pair] += counts[word]
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        words = {word: apply_merge(symbols, best) for word, symbols in words.items()}
    return merges


def encode_word(word: bytes, ranks: dict[Pair, int]) -> list[bytes]:
    """Apply the merges to one word: always the pair of lowest rank, leftmost first, until none is left."""
    symbols = [bytes([byte]) for byte in word]
    while len(symbols) > 1:
        best = min(pairwise(symbols), key=lambda pair: ranks.get(pair, len(ranks)))
        if best not in ranks:
            break
        symbols = apply_merge(symbols, best)
    return symbols
