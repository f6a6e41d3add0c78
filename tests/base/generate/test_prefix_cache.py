"""The prefix cache: the same tokens as without it, less reading, no block of other weights, within its budget."""

import pytest
import torch

from graft.base.generate.engine import Engine
from graft.base.generate.prefix_cache import BLOCK, PrefixCache
from graft.base.generate.sampling import Sampling
from graft.base.model.config import ModelConfig
from graft.base.model.transformer import Transformer

CONFIG = ModelConfig(83, d_model=32, n_layers=3, n_heads=4, n_kv_heads=2, d_head=16, d_ff=64, max_seq_len=400)
BLOCK_BYTES = 3 * 2 * 2 * BLOCK * 16 * 4  # layers, keys and values, kv heads, tokens, width, float32


def wide_weights(config: ModelConfig = CONFIG) -> Transformer:
    """Logits that differ by much more than rounding."""
    built = Transformer(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in built.parameters():
        parameter.data.normal_(0, 0.3, generator=generator)
    return built.eval()


@pytest.fixture(scope="module")
def model() -> Transformer:
    return wide_weights()


def tokens_of(engine: Engine, prompts: list[list[int]], new: int = 6) -> list[list[int]]:
    rows = {engine.add(ids, Sampling(max_new_tokens=new)): [] for ids in prompts}
    while engine.n_running or engine.n_waiting:
        for event in engine.step():
            rows[event.request].append(event.token)
    return list(rows.values())


def random_ids(n: int, seed: int) -> list[int]:
    return torch.randint(0, 83, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("windows", [None, (False, True, False)])
@pytest.mark.parametrize("max_batch", [1, 3])
def test_tokens_are_those_without_a_cache(windows: tuple[bool, ...] | None, max_batch: int) -> None:
    """Law: prompts that share nothing, a part, or all of what came before give what an engine without a cache gives.

    Shared lengths are 0, whole blocks and parts of blocks; one prompt is a whole number of blocks, where the last token
    must still be read; running rows and waiting ones are mixed; a window of 20 hides a part of the shared blocks.
    """
    model = wide_weights(
        CONFIG
        if windows is None
        else ModelConfig(**{**CONFIG.__dict__, "sliding_window": 20, "sliding_layers": windows})
    )
    long = random_ids(200, 1)
    prompts = [long, long[:130] + random_ids(9, 2), random_ids(40, 3), long[:64], long[:64], long + random_ids(40, 4)]
    prompts += [long[:50] + random_ids(3, 5), random_ids(2, 6), long[:96] + random_ids(70, 7)]
    cache = PrefixCache(1 << 24)
    engine = Engine(model, max_batch=max_batch, prefix_cache=cache)
    expected = [tokens_of(Engine(model), [ids])[0] for ids in prompts]
    assert tokens_of(engine, prompts) == expected
    assert cache.n_prompt_tokens == sum(map(len, prompts))
    # By hand: 128 of 130, 0, 32 of 64 (the last token must be read), 32, 192 of 200, 32 of 50, 0, 96.
    assert cache.n_hit_tokens == 128 + 0 + 32 + 32 + 192 + 32 + 0 + 96
    assert tokens_of(engine, prompts[::-1]) == expected[::-1]


def test_a_shared_prefix_is_read_once(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Worked by hand: 8 prompts of 320 + 5 tokens that come at once. The first is read whole, of the others 5 tokens:
    325 + 7 * 5 positions instead of 8 * 325."""
    read = 0
    forward = Transformer.forward

    def counted(self: Transformer, ids: torch.Tensor, **options: object) -> torch.Tensor:
        nonlocal read
        read += ids.numel() if ids.shape[1] > 1 else 0
        return forward(self, ids, **options)  # pyright: ignore

    monkeypatch.setattr(Transformer, "forward", counted)
    shared = random_ids(320, 1)
    prompts = [shared + random_ids(5, seed) for seed in range(2, 10)]
    with_cache = tokens_of(Engine(model, prefix_cache=PrefixCache(1 << 24)), prompts)
    assert read == 325 + 7 * 5
    read = 0
    assert tokens_of(Engine(model), prompts) == with_cache
    assert read == 8 * 325


def test_a_finished_answer_is_a_prefix_too(model: Transformer) -> None:
    """A second turn repeats the first prompt and its answer: all whole blocks of both are found."""
    cache = PrefixCache(1 << 24)
    engine = Engine(model, prefix_cache=cache)
    first = random_ids(20, 1)
    [answer] = tokens_of(engine, [first], new=60)
    second = [*first, *answer, 5, 6]
    found = tokens_of(engine, [second])
    assert cache.n_hit_tokens == (20 + 59) // BLOCK * BLOCK  # the answer's last token was never read
    assert found == tokens_of(Engine(model), [second])


def test_the_budget_holds_and_the_oldest_go(model: Transformer) -> None:
    """Law: never more bytes than the budget; what was used last is still there; a prompt larger than it all does no harm."""
    cache = PrefixCache(4 * BLOCK_BYTES)
    engine = Engine(model, prefix_cache=cache)
    a, b, c = (random_ids(2 * BLOCK + 1, seed) for seed in (1, 2, 3))
    for ids in (a, b, a, c):
        tokens_of(engine, [ids])
        assert cache.n_bytes == len(cache) * BLOCK_BYTES <= cache.max_bytes
    assert [len(cache.find("", ids)) for ids in (a, b, c)] == [2, 0, 2]
    large = random_ids(300, 4)
    assert tokens_of(engine, [large]) == tokens_of(Engine(model), [large])
    assert cache.n_bytes <= cache.max_bytes
    cache.clear()
    assert (len(cache), cache.n_bytes, cache.find("", a)) == (0, 0, [])


def test_other_weights_share_nothing(model: Transformer) -> None:
    """Blocks are found under the weights' content alone, and equal blocks after other ones are other blocks."""
    cache = PrefixCache(1 << 24)
    ids = random_ids(100, 1)
    tokens_of(Engine(model, prefix_cache=cache), [ids])
    assert len(cache.find("", ids)) == 3
    assert cache.find("another adapter's hash", ids) == []
    assert cache.find("", ids[BLOCK:]) == []


def test_a_budget_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="max_bytes=0 must be >= 1"):
        PrefixCache(0)
