"""The fast path of byte-level BPE, held to reference.py by the tests.

memory.py       padded text and aligned tables, and the checks of what enters a loop that reads by address
scan.py         text -> pretokens, for the four known split patterns
words.py        the hash table of pretokens: counts them in training, holds their ids in encoding
pair_index.py   the hash table of token pairs, for training
merges.py       pretoken counts -> merges (training)
encode.py       pretokens -> ids
decode.py       ids -> bytes
"""
