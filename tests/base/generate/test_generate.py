"""Generation: the cache is the full forward pass, rows don't see each other, sampling has the right probabilities."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import graft
from graft.base.generate.engine import generate_ids
from graft.base.generate.kv_cache import KVCache
from graft.base.generate.sampling import filter_logits, sample
from graft.base.model.config import ModelConfig
from graft.base.model.transformer import Transformer
from graft.base.tokenizer.definition import AddedToken, Definition
from graft.base.tokenizer.tokenizer import Tokenizer
from graft.finetune.data.stop import stop_ids
from graft.finetune.generate import ids_with_text

CONFIG = ModelConfig(83, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_head=16, d_ff=64, max_seq_len=48)


@pytest.fixture(scope="module")
def model() -> Transformer:
    """Wide weights, so that logits differ by much more than rounding."""
    built = Transformer(CONFIG)
    generator = torch.Generator().manual_seed(0)
    for parameter in built.parameters():
        parameter.data.normal_(0, 0.3, generator=generator)
    return built.eval()


def greedy_without_cache(model: Transformer, prompt: list[int], n: int) -> list[int]:
    ids = list(prompt)
    for _ in range(n):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def test_cache_equals_the_full_forward_pass(model: Transformer) -> None:
    """Law: reading 20 tokens as 9 + 1 + 7 + 3 through the cache gives the logits of reading them at once."""
    ids = torch.randint(0, 83, (3, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(ids)
        cache = KVCache(CONFIG, 3, 20, dtype=torch.float32, device="cpu")
        pieces = []
        for start, stop in ((0, 9), (9, 10), (10, 17), (17, 20)):
            pieces.append(model(ids[:, start:stop], cache=cache))
            cache.advance(torch.full((3,), stop - start))
    found = torch.cat(pieces, 1)
    torch.testing.assert_close(found, expected, atol=2e-5 * expected.abs().max().item(), rtol=0)
    assert cache.n_bytes == 2 * 2 * 3 * 2 * 20 * 16 * 4


def test_rows_of_different_lengths_are_each_row_alone(model: Transformer) -> None:
    """Law: greedy continuation of a ragged batch = each prompt alone = no cache at all."""
    prompts = [[5, 6, 7, 8, 9, 10, 11], [3], [40, 2, 60]]
    together = generate_ids(model, prompts, max_new_tokens=12)
    assert together == [generate_ids(model, [prompt], max_new_tokens=12)[0] for prompt in prompts]
    assert together == [greedy_without_cache(model, prompt, 12) for prompt in prompts]


def test_stop_tokens_end_a_row_and_only_it(model: Transformer) -> None:
    """Law: a row ends before its first stop token; the others go on."""
    prompts = [[5, 6, 7], [3, 9]]
    free = generate_ids(model, prompts, max_new_tokens=10)
    stop = free[0][4]
    stopped = generate_ids(model, prompts, max_new_tokens=10, stop_ids={stop})
    for whole, cut in zip(free, stopped, strict=True):
        assert cut == (whole[: whole.index(stop)] if stop in whole else whole)


def test_sampling_is_seeded_by_row(model: Transformer) -> None:
    """Law: the same seed, the same text, whatever the neighbours; another seed, another text."""
    one = generate_ids(model, [[1, 2], [3, 4]], max_new_tokens=20, temperature=1.5, seed=7)
    assert one == generate_ids(model, [[1, 2], [3, 4]], max_new_tokens=20, temperature=1.5, seed=7)
    assert one[0] == generate_ids(model, [[1, 2]], max_new_tokens=20, temperature=1.5, seed=7)[0]
    assert one != generate_ids(model, [[1, 2], [3, 4]], max_new_tokens=20, temperature=1.5, seed=8)


def test_filters_by_hand() -> None:
    """Worked by hand: probabilities 1/2, 1/4, 1/8, 1/8. top_k 2 -> 2/3, 1/3. top_p 0.7: 1/2 < 0.7 <= 3/4 keeps two.
    Temperature 1/2 squares them: 16/22, 4/22, 1/22, 1/22."""
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    assert filter_logits(logits, temperature=1.0, top_k=2)[0].tolist() == pytest.approx([2 / 3, 1 / 3, 0, 0])
    assert filter_logits(logits, temperature=1.0, top_p=0.7)[0].tolist() == pytest.approx([2 / 3, 1 / 3, 0, 0])
    assert filter_logits(logits, temperature=1.0, top_p=0.5)[0].tolist() == pytest.approx([1, 0, 0, 0])
    assert filter_logits(logits, temperature=0.5)[0].tolist() == pytest.approx([16 / 22, 4 / 22, 1 / 22, 1 / 22])
    assert sample(logits, [torch.Generator()]).tolist() == [0]


def test_sampled_frequencies() -> None:
    """Law: 4,000 draws have the filtered probabilities; 5 standard deviations of a binomial are sqrt(p q / n) * 5 < 0.04."""
    logits = torch.tensor([[0.5, 0.25, 0.25]]).log().expand(4000, -1)
    drawn = sample(logits, [torch.Generator().manual_seed(i) for i in range(4000)], temperature=1.0)
    frequencies = torch.bincount(drawn, minlength=3) / 4000
    torch.testing.assert_close(frequencies, torch.tensor([0.5, 0.25, 0.25]), atol=0.04, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1.0 must be >= 0"),
        ({"temperature": 1.0, "top_k": 0}, "top_k=0 must be >= 1"),
        ({"temperature": 1.0, "top_p": 1.5}, r"top_p=1\.5 must lie in \(0, 1\]"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be >= 1"),
        (
            {"max_new_tokens": 47},
            "prompt 0 has 2 tokens; with max_new_tokens=47 that is more than the model's max_seq_len=48",
        ),
    ],
)
def test_refusals(model: Transformer, options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate_ids(model, [[1, 2]], **{"max_new_tokens": 3} | options)
    with pytest.raises(ValueError, match="prompt 1 has no token"):
        generate_ids(model, [[1], []], max_new_tokens=3)
    with pytest.raises(ValueError, match="temperature=0 must be > 0 here"):
        filter_logits(torch.zeros(1, 2), temperature=0)


def test_public_generate(base_dir: Path) -> None:
    """Law: graft.generate is the greedy loop on the tokenizer's ids; an empty prompt starts from EOS."""
    model, tokenizer = graft.load_model(base_dir), Tokenizer.load(base_dir)
    prompt = "the cat sat"
    pieces: list[str] = []
    [text, _] = graft.generate(
        model,
        tokenizer,
        [prompt, ""],
        max_new_tokens=9,
        on_text=lambda row, piece: pieces.append(piece) if row == 0 else None,
    )
    ids = greedy_without_cache(model, tokenizer.encode(prompt).tolist(), 9)
    stops = stop_ids(model.config, tokenizer)
    ends = [i for i, token in enumerate(ids) if token in stops]
    assert text == tokenizer.decode(ids[: ends[0]] if ends else ids)
    assert "".join(pieces) == text
    with pytest.raises(TypeError, match="prompts is one string"):
        graft.generate(model, tokenizer, "the cat")
    with pytest.raises(ValueError, match="2 adapters for 1 prompts"):
        graft.generate(model, tokenizer, ["a"], adapters=["x", None])
    with pytest.raises(ValueError, match="adapter 'x' is named, but the model has no bank"):
        graft.generate(model, tokenizer, ["a"], adapters=["x"])


def test_rows_without_a_token_are_never_chosen(model: Transformer) -> None:
    """A model may have more embedding rows than the tokenizer has tokens; the likeliest of the others is taken."""
    free = generate_ids(model, [[5, 6, 7]], max_new_tokens=12)[0]
    limit = max(free)
    bound = generate_ids(model, [[5, 6, 7]], max_new_tokens=12, allowed=torch.arange(83) < limit)[0]
    assert max(bound) < limit
    with torch.no_grad():
        ids = torch.tensor([[5, 6, 7, *bound[:-1]]])
        assert model(ids)[0, 2:, :limit].argmax(-1).tolist() == bound


def test_ids_with_text() -> None:
    """Rows beyond the vocabulary and gaps in it are out; what ends a text stays in though it has no token."""
    definition = Definition({byte: bytes([byte]) for byte in range(256)}, [], (AddedToken("<x>", 300),), ("",))
    tokenizer = Tokenizer(definition)
    model = Transformer(replace(CONFIG, vocab_size=320, eos_token_id=310))
    allowed = ids_with_text(model, tokenizer, stop_ids(model.config, tokenizer))
    assert allowed is not None
    assert allowed.nonzero().flatten().tolist() == [*range(256), 300, 310]
    assert ids_with_text(Transformer(replace(CONFIG, vocab_size=257)), tokenizer, frozenset()) is None
