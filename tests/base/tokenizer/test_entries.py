"""Law: whatever is given to a function whose loop reads by address is refused or handled; it never ends the process."""

import subprocess
import sys

CHILD = """
import itertools
import random

import numpy as np

from graft.base.tokenizer.compiled import merges
from graft.base.tokenizer.compiled.decode import Decoder
from graft.base.tokenizer.compiled.encode import Encoder
from graft.base.tokenizer.compiled.scan import word_starts
from graft.base.tokenizer.compiled.words import WordCounter
from graft.base.tokenizer.definition import AddedToken, new_definition
from graft.base.tokenizer.tokenizer import Tokenizer

rng = random.Random(0)
counts = {"refused": 0, "handled": 0}


def attempt(call):
    try:
        call()
        counts["handled"] += 1
    except (ValueError, TypeError) as error:
        assert "\\n" not in str(error), error
        counts["refused"] += 1


NUMBERS = [0, 1, 5, -1, 2**31 - 1, 2**31, 2**40, -(2**40)]
DTYPES = [np.int64, np.int32, np.uint64, np.float64, np.uint8]


def array():
    n = rng.choice([0, 1, 2, 3, 7])
    values = np.array([rng.choice(NUMBERS) for _ in range(n)], np.float64).astype(np.int64).astype(rng.choice(DTYPES))
    shape = rng.randrange(4)
    return values.reshape(1, -1) if shape == 0 else values[::-1] if shape == 1 else values


DATA = [b"", b"a", b"the cat's 12 hats", b"\\xff\\xfe\\xf7\\xbf\\xbf\\xbf", b"caf\\xc3", b"\\xf7" * 40, b"x" * 9000]
definition = new_definition([(b"a", b"b"), (b"ab", b"ab")], ["<s>"], "gpt2")
for _ in range(400):
    data, kind = rng.choice(DATA), rng.randrange(-1, 6)
    encoder, counter = Encoder(definition), WordCounter()
    attempt(lambda: word_starts(data, kind))
    attempt(lambda: encoder.encode_bytes(data, array(), kind))
    attempt(lambda: encoder.encode([data, data]))
    attempt(lambda: counter.add_text(data, array(), array(), kind))
    attempt(lambda: counter.add_words((np.frombuffer(data, np.uint8), array(), array())))
    attempt(lambda: merges.train((np.frombuffer(data, np.uint8), array(), array()), 5))
    attempt(lambda: Decoder(definition.vocab).decode(array()))

from dataclasses import replace

for wrong in (-1, -2, 2**21, 10**9):
    vocab = dict(definition.vocab)
    vocab[wrong] = vocab.pop(256)
    attempt(lambda: Tokenizer(replace(definition, vocab=vocab)).encode("abab ab"))
    attempt(lambda: Encoder(replace(definition, vocab=vocab)).encode([b"abab ab"]))
    attempt(lambda: Decoder(vocab))
    attempt(lambda: Tokenizer(replace(definition, added=(AddedToken("<s>", wrong),))))
assert counts["refused"] > 500 and counts["handled"] > 500, counts
print("all done")
"""


def test_wrong_values_at_every_entry_end_no_process() -> None:
    """2,800 seeded calls with wrong dtypes, lengths, ranges, strides and bytes that are not UTF-8, in a child process."""
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, timeout=240)
    assert (done.returncode, done.stdout) == (0, "all done\n"), done.stderr[-2000:]
