"""Finds added tokens in text exactly as the tokenizers library does (its added_vocabulary.rs).

First the tokens with `normalized: false` are found in the raw text; then each stretch between them is normalized, and the
others, their own text normalized too, are found in that. At each place the longest token counts. Which of two tokens counts that
normalize to the same text is left to chance in the library; here it is the file's first.
"""

from collections.abc import Callable, Iterator, Sequence

import regex

from .definition import AddedToken

_WORD = r"[\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\p{Join_Control}]"  # Rust's \w
_IN_WORD = regex.compile(_WORD)
_SPACE = regex.compile(r"\p{White_Space}")


class TokenMatcher:
    """Cuts text at a set of added tokens."""

    def __init__(self, tokens: Sequence[AddedToken], normalize: Callable[[str], str]):
        self._normalize = normalize
        self._raw = _Finder([(token.content, token) for token in tokens if not token.normalized])
        self._normalized = _Finder([(normalize(token.content), token) for token in tokens if token.normalized])

    def split(self, text: str) -> tuple[list[str], list[int]]:
        """Normalized plain stretches and the ids of the tokens between them: one stretch more than tokens, some empty."""
        plain, ids = [""], []
        for raw in self._raw.split(text):
            for part in [raw] if isinstance(raw, int) else self._normalized.split(self._normalize(raw)):
                if isinstance(part, int):
                    ids.append(part)
                    plain.append("")
                else:
                    plain[-1] = part
        return plain, ids


class _Finder:
    def __init__(self, spelt: list[tuple[str, AddedToken]]):
        self._tokens: dict[str, AddedToken] = {}
        for text, token in spelt:
            if text:
                self._tokens.setdefault(text, token)
        longest_first = sorted(self._tokens, key=len, reverse=True)
        self._pattern = regex.compile("|".join(map(regex.escape, longest_first))) if longest_first else None

    def split(self, text: str) -> Iterator[str | int]:
        """Stretches of plain text, none of them empty, and ids."""
        done = 0
        for match in self._pattern.finditer(text) if self._pattern else ():
            token, start, end = self._tokens[match.group()], match.start(), match.end()
            if token.single_word and (
                _IN_WORD.match(text[max(start - 1, 0) : start]) or _IN_WORD.match(text[end : end + 1])
            ):
                continue  # its characters are plain text, and no other token may start inside them
            if token.lstrip:  # white space that the token before took stays with that one
                while start > done and _SPACE.match(text[start - 1]):
                    start -= 1
            if token.rstrip:
                while end < len(text) and _SPACE.match(text[end]):
                    end += 1
            if done < start:
                yield text[done:start]
            yield token.id
            done = end
        if done < len(text):
            yield text[done:]
