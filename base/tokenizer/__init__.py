"""Byte-level BPE. Read in this order:

    reference.py    the algorithm in its plainest form: regex and dictionaries, no speed
    patterns.py     the regular expressions that split text into pretokens
    split.py        cuts text by any other regular expressions
    definition.py   what decides which ids a text gets: vocabulary, merges, added tokens, split patterns
    added_tokens.py finds special tokens in text before it is split
    training.py     files -> pretoken counts -> merges -> a definition
    files.py        definition <-> tokenizer.json and its companions
    tokenizer.py    Tokenizer, the class that users meet
    compiled/       the same algorithm, fast: the loops that Numba compiles
    tools/          the command line: train, encode, decode, show, compare

Arrows: tools -> tokenizer -> files, training -> compiled -> definition, patterns, split.
The tests compare both ways of splitting and merging with reference. base/text/ lies below.
"""
