"""The split patterns: which stretches of text become the words that merges never cross.

GPT4 is tiktoken's cl100k_base; it differs from LLAMA3 only in white space at the very end of a text. The strings are
written without possessive quantifiers and `$`, which the `tokenizers` library (Oniguruma) reads differently.
"""

GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_HEAD = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
LLAMA3 = _HEAD + r"\p{N}{1,3}" + _TAIL
QWEN2 = _HEAD + r"\p{N}" + _TAIL
GPT4 = _HEAD + r"\p{N}{1,3}" + _TAIL.replace(r"|\s*[\r\n]+", r"|\s+(?![\s\S])|\s*[\r\n]+")

NAMED = {"gpt2": GPT2, "gpt4": GPT4, "cl100k": GPT4, "llama3": LLAMA3, "qwen2": QWEN2}

_CHOICE = f"choose {', '.join(NAMED)} or fix the expression"

# Other spellings of the same four splits, as found in tokenizer.json files and in tiktoken.
_SPELLINGS = {
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+": GPT2,
    r"'s|'t|'re|'ve|'m|'ll|'d| ?[\p{L}]+| ?[\p{N}]+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+": GPT2,
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s": GPT2,
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|"
    r"\s++$|\s*[\r\n]|\s+(?!\S)|\s": GPT4,
}

# How scan.py tells the patterns apart; WHOLE: the text is already cut, each stretch is one pretoken.
WHOLE, KIND_GPT2, KIND_LLAMA3, KIND_QWEN2, KIND_GPT4 = 0, 1, 2, 3, 4
_KINDS = {GPT2: KIND_GPT2, LLAMA3: KIND_LLAMA3, QWEN2: KIND_QWEN2, GPT4: KIND_GPT4}


def resolve(pattern: str) -> str:
    """A pattern's name or any spelling of a known pattern -> its one spelling here; other patterns are returned as is.

    Raises ValueError when the `regex` package can't compile it, or when it is a misspelt name.
    """
    import regex

    if pattern in NAMED:
        return NAMED[pattern]
    if pattern in _SPELLINGS:
        return _SPELLINGS[pattern]
    if regex.fullmatch(r"[\w-]+", pattern):  # as an expression it would cut at that very word only
        raise ValueError(f"unknown pattern {pattern!r}; choose {', '.join(NAMED)} or give a regular expression")
    try:
        compiled = regex.compile(pattern)
    except regex.error as error:
        raise ValueError(f"pattern {pattern!r} is not a valid regular expression ({error}); {_CHOICE}") from None
    if compiled.match("") is not None:
        raise ValueError(f"pattern {pattern!r} matches the empty string, so it can't cut text into words; {_CHOICE}")
    return pattern


def kind_of(pattern: str) -> int:
    """The fast scanner's number for a resolved pattern; WHOLE when only the general path can split by it."""
    return _KINDS.get(pattern, WHOLE)


# GPT-4o's pattern (o200k) and others end in alternatives that between them match any character: a stretch of other
# characters, white space, letters, digits.
_REST = (
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*", r" ?[^\s\p{L}\p{N}]+[\r\n]*", r" ?[^\s\p{L}\p{N}]+", r"[^\s\p{L}\p{N}]+",
)  # fmt: skip
_LETTERS = (r"\p{L}+", r" ?\p{L}+", r"[^\r\n\p{L}\p{N}]?\p{L}+")
_NUMBERS = (r"\p{N}", r"\p{N}+", r" ?\p{N}+", r"\p{N}{1,3}")
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
)


def covers_all_text(pattern: str) -> bool:
    """Whether it is certain that the pattern's matches leave no character out, whatever the text.

    Known by its alternatives: white space, other characters, digits and letters must each have one that matches them
    wherever they stand. False means only that it isn't known.
    """
    if kind_of(pattern) != WHOLE:
        return True
    alternatives = _alternatives(pattern)
    bare = [_without_contractions(one) for one in alternatives]
    letters = any(one in alternatives for one in _LETTERS) or all(one in bare for one in _CASED)
    return (
        r"\s+" in alternatives
        and letters
        and any(one in alternatives for one in _REST)
        and any(one in alternatives for one in _NUMBERS)
    )


def _alternatives(pattern: str) -> list[str]:
    """The pattern's top-level alternatives."""
    parts, depth, escaped, in_class = [""], 0, False, False
    for character in pattern:
        if not escaped and not in_class:
            depth += {"(": 1, ")": -1}.get(character, 0)
        if not escaped and character in "[]":
            in_class = character == "["
        if character == "|" and depth == 0 and not escaped and not in_class:
            parts.append("")
        else:
            parts[-1] += character
        escaped = character == "\\" and not escaped
    return parts


def _without_contractions(alternative: str) -> str:
    """An alternative without the optional 's, 't, ... behind it (GPT-4o)."""
    return alternative.removesuffix("(?i:'s|'t|'re|'ve|'m|'ll|'d)?")
