"""JSON of a schema out of a model that knows nothing: the grammar alone makes it valid."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from graft.base.generate.engine import Engine, generate_ids
from graft.base.generate.json_grammar import JsonGrammar
from graft.base.generate.sampling import Sampling
from graft.base.generate.speculative import NgramDraft
from graft.base.model.config import ModelConfig
from graft.base.model.transformer import Transformer
from graft.base.tokenizer.tokenizer import Tokenizer

pytest.importorskip("llguidance")
jsonschema = pytest.importorskip("jsonschema")

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["cat", "dog", "größe"]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
        "home": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/place"}]},
    },
    "$defs": {"place": {"type": "object", "properties": {"x": {"type": "integer", "multipleOf": 5, "maximum": 99, "minimum": 0}},
                        "required": ["x"], "additionalProperties": False}},
    "required": ["name", "age", "kind", "tags", "home"],
    "additionalProperties": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir: Path) -> Tokenizer:
    return Tokenizer.load(tokenizer_dir)


@pytest.fixture(scope="module")
def model(tokenizer: Tokenizer) -> Transformer:
    """Random weights, and 5 rows more than there are tokens."""
    built = Transformer(ModelConfig(tokenizer.vocab_size + 5, d_model=16, n_layers=1, n_heads=1, n_kv_heads=1, d_head=16,
                                    d_ff=16, max_seq_len=256))  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    for parameter in built.parameters():
        parameter.data.normal_(0, 0.5, generator=generator)
    return built.eval()


def stops_of(tokenizer: Tokenizer) -> set[int]:
    return {tokenizer.special_tokens["<|endoftext|>"]}


def answers(model: Transformer, tokenizer: Tokenizer, grammar: JsonGrammar, n: int, **options: Any) -> list[str]:
    jobs = [Sampling(1.0 if i else 0.0, seed=i, max_new_tokens=220, stop_ids=stops_of(tokenizer), grammar=grammar)
            for i in range(n)]  # fmt: skip
    produced = generate_ids(model, [[1, 2, 3]] * n, jobs, **options)
    assert all(len(ids) < 220 for ids in produced), "a text was cut, so it says nothing"
    return [tokenizer.decode(ids) for ids in produced]


@pytest.mark.parametrize("drafter", [None, NgramDraft])
def test_every_answer_is_of_the_schema(model: Transformer, tokenizer: Tokenizer, drafter: Any) -> None:
    """Parity with jsonschema's own check: 24 answers of a random model, greedy and sampled, side by side, with and without
    speculation; they differ from each other, so nothing is canned."""
    grammar = JsonGrammar(tokenizer, vocab_size=tokenizer.vocab_size + 5, stop_ids=stops_of(tokenizer), schema=PERSON)
    texts = answers(model, tokenizer, grammar, 24, drafter=drafter() if drafter else None)
    for text in texts:
        jsonschema.validate(json.loads(text), PERSON)
    assert len(set(texts)) > 12


def test_a_neighbour_is_free(model: Transformer, tokenizer: Tokenizer) -> None:
    """Law: a request without a grammar is not touched by one beside it, and a cut answer is a valid one's beginning."""
    grammar = JsonGrammar(tokenizer, vocab_size=tokenizer.vocab_size + 5, stop_ids=stops_of(tokenizer))
    [alone] = generate_ids(model, [[4, 5]], Sampling(max_new_tokens=6))
    engine = Engine(model)
    free = engine.add([4, 5], Sampling(max_new_tokens=6))
    bound = engine.add([4, 5], Sampling(max_new_tokens=6, grammar=grammar, stop_ids=stops_of(tokenizer)))
    tokens: dict[int, list[int]] = {free: [], bound: []}
    while engine.n_running or engine.n_waiting:
        for event in engine.step():
            tokens[event.request].append(event.token)
    assert tokens[free] == alone
    assert tokenizer.decode(tokens[bound]).startswith("{")
    assert tokens[bound] != alone


def test_bad_schemas_are_named(tokenizer: Tokenizer) -> None:
    options: dict[str, Any] = {"vocab_size": tokenizer.vocab_size, "stop_ids": stops_of(tokenizer)}
    for schema in ({"type": "thing"}, {"type": "string", "format": "no-such"}, {"$ref": "#/nowhere"}, {"minimum": "x"}):
        with pytest.raises(ValueError, match="the JSON schema can't be used: "):
            JsonGrammar(tokenizer, schema=schema, **options)
    with pytest.raises(ValueError, match="ends with a stop token, and there is none"):
        JsonGrammar(tokenizer, vocab_size=tokenizer.vocab_size, stop_ids=())
