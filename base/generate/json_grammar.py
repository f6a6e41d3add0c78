"""Answers that are JSON of a schema: a grammar that says which tokens may come next, through llguidance (the extra `json`).

    grammar = JsonGrammar(tokenizer, vocab_size=V, stop_ids={2}, schema={"type": "object", ...})
    engine.add(ids, Sampling(stop_ids={2}, grammar=grammar))

The text is valid JSON of the schema when it ends with a stop token; one that is cut by `max_new_tokens` is its beginning.
"""

import json
from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..extras import how_to_install
from ..tokenizer.tokenizer import Tokenizer
from .sampling import Matcher

ANY_OBJECT: dict[str, object] = {"type": "object"}  # OpenAI's json_object
# One line with single spaces: a model that likes blanks better than an end would else go on with them for ever.
WHITESPACE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class JsonGrammar:
    """The texts that are JSON of one schema, in a tokenizer's tokens. Made once, used by any number of requests.

    Raises ValueError for a schema that llguidance doesn't take (it names what), for no stop token, which the text could not
    end without, and where llguidance is missing.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        vocab_size: int,  # of the model, which may have more rows than the tokenizer has tokens
        stop_ids: Collection[int],  # tokens that end the text
        schema: Mapping[str, object] | None = None,  # JSON schema; None: any object
    ) -> None:
        try:
            import llguidance
        except ImportError:
            raise ValueError(f"JSON answers need llguidance: {how_to_install('json')}") from None
        if not stop_ids:
            raise ValueError("a JSON answer ends with a stop token, and there is none; give the tokenizer an eos token")
        self.vocab_size, self.schema = vocab_size, dict(ANY_OBJECT if schema is None else schema)
        self._library: Any = llguidance
        self._tokens = _tokens(tokenizer, vocab_size, frozenset(stop_ids))
        text, problem = "", ""
        try:
            text = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(self.schema), overrides=WHITESPACE)  # pyright: ignore
            problem = llguidance.LLMatcher.validate_grammar(text, self._tokens)
        except ValueError as error:
            problem = str(error)
        if problem and not problem.startswith("WARNING"):
            raise ValueError(f"the JSON schema can't be used: {' '.join(problem.split())[:300]}")
        self._text = text

    def matcher(self) -> Matcher:
        """See Grammar."""
        return JsonMatcher(self._library.LLMatcher(self._tokens, self._text, log_level=0), self.vocab_size)


class JsonMatcher:
    """One text on its way. Raises ValueError where llguidance gives up: a grammar too large for its limits."""

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size

    def allowed(self) -> Tensor:
        """See Matcher."""
        bias = torch.frombuffer(
            bytearray(self._matcher.compute_logit_bias()), dtype=torch.uint8
        )  # (>= V,): 0 is forbidden
        self._check()
        return bias[: self._vocab_size] != 0

    def advance(self, token: int) -> None:
        """See Matcher."""
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ValueError(f"the JSON grammar failed: {self._matcher.get_error()}")


@lru_cache(maxsize=8)
def _tokens(tokenizer: Tokenizer, vocab_size: int, stop_ids: frozenset[int]) -> Any:
    """The tokenizer as llguidance knows it: each token's bytes. Special tokens spell no text."""
    import llguidance

    class Spelled:
        """What llguidance.TokenizerWrapper asks of a tokenizer."""

        def __init__(self) -> None:
            self.eos_token_id, self.bos_token_id = min(stop_ids), None
            self.tokens = [tokenizer.vocab.get(i, b"") for i in range(vocab_size)]
            self.special_token_ids = sorted({*tokenizer.special_tokens.values(), *stop_ids})

        def __call__(self, text: str | bytes) -> list[int]:
            return tokenizer.encode(text if isinstance(text, str) else text.decode()).tolist()

    wrapper = llguidance.TokenizerWrapper(Spelled())
    return llguidance.LLTokenizer(wrapper, n_vocab=vocab_size, eos_token=sorted(stop_ids))
