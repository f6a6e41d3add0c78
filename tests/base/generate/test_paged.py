"""The engine over pages, prompts in chunks, priorities: each request still gets what it would get alone."""

import pytest
import torch

from graft.base.generate.engine import Engine, generate_ids
from graft.base.generate.prefix_cache import PrefixCache
from graft.base.generate.sampling import Sampling
from graft.base.model.config import ModelConfig
from graft.base.model.paged_cache import PAGE
from graft.base.model.transformer import Transformer

CONFIG = ModelConfig(83, d_model=32, n_layers=3, n_heads=4, n_kv_heads=2, d_head=16, d_ff=64, max_seq_len=256)
PAGE_BYTES = 2 * 2 * PAGE * 16 * 4 * 3  # keys and values, kv heads, tokens, head size, float32, layers


def weights(config: ModelConfig) -> Transformer:
    built = Transformer(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in built.parameters():
        parameter.data.normal_(0, 0.3, generator=generator)
    return built.eval()


@pytest.fixture(scope="module")
def model() -> Transformer:
    return weights(CONFIG)


def prompts_of(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(0, 83, (n,), generator=generator).tolist() for n in lengths]


def drain(engine: Engine) -> dict[int, list[int]]:
    tokens: dict[int, list[int]] = {}
    while engine.n_running or engine.n_waiting:
        for event in engine.step():
            tokens.setdefault(event.request, []).append(event.token)
    return tokens


def pages_in_use(engine: Engine) -> int:
    assert engine._pool is not None
    return engine._pool.n_pages - 1 - engine._pool.n_free


@pytest.mark.parametrize(
    ("n_pages", "windows", "temperature"),
    [(6, None, 0.0), (6, (True, False, True), 0.8), (40, (True, False, True), 0.0), (40, None, 0.8)],
)
def test_pages_that_run_out_change_nothing(n_pages: int, windows: tuple[bool, ...] | None, temperature: float) -> None:
    """Law: with room for all, and with so little that requests give their pages back and are read again, each text is the one
    that the rows' cache gives, drawn with the same random numbers; all pages are free at the end."""
    fields = {} if windows is None else {"sliding_window": 20, "sliding_layers": windows}
    model = weights(ModelConfig(**{**CONFIG.__dict__, **fields}))
    prompts = prompts_of(1, 40, 32, 33, 7, 64, 64, 20)
    prompts[6] = prompts[5]  # equal prompts share pages
    jobs = [(p, Sampling(temperature, max_new_tokens=20 + 3 * i, seed=i)) for i, p in enumerate(prompts)]
    expected = generate_ids(model, prompts, [one for _, one in jobs])
    engine = Engine(model, max_batch=4, cache_bytes=n_pages * PAGE_BYTES)
    requests = [engine.add(*job) for job in jobs]
    found = drain(engine)
    assert [found[request] for request in requests] == expected
    assert (engine.n_preempted > 0) == (n_pages == 6)
    assert pages_in_use(engine) == 0


def test_a_prefix_is_one_page_for_all(model: Transformer) -> None:
    """Law: prompts with the same beginning share its pages, and get what they get alone; what the prefix cache keeps goes
    when pages are needed, the rest is free."""
    [shared, *own] = prompts_of(96, 5, 9, 12, 3)
    prompts = [shared + each for each in own]
    expected = [generate_ids(model, [p], Sampling(max_new_tokens=10))[0] for p in prompts]
    cache = PrefixCache(1 << 30)
    engine = Engine(model, max_batch=4, cache_bytes=20 * PAGE_BYTES, prefix_cache=cache)
    first = engine.add(prompts[0], Sampling(max_new_tokens=10))
    assert drain(engine)[first] == expected[0]
    requests = [engine.add(p, Sampling(max_new_tokens=10)) for p in prompts[1:]]
    begun = {event.request: event.token for event in engine.step()}
    assert pages_in_use(engine) == 3 + 3  # the prefix, and a page for each row
    found = drain(engine)
    assert [[begun[request], *found[request]] for request in requests] == expected[1:]
    assert cache.n_hit_tokens == 3 * 96
    [other] = prompts_of(200)
    request = engine.add(other, Sampling(max_new_tokens=40))
    for _ in range(12):  # other prompts push the kept pages out
        engine.add([1, *other[:150]], Sampling(max_new_tokens=30))
    assert drain(engine)[request] == generate_ids(model, [other], Sampling(max_new_tokens=40))[0]
    assert pages_in_use(engine) == len(cache)
    cache.clear()
    assert pages_in_use(engine) == 0


def test_removal_gives_pages_back(model: Transformer) -> None:
    """Running, waiting, and while its prompt is being read."""
    prompts = prompts_of(40, 90, 30)
    engine = Engine(model, max_batch=2, cache_bytes=30 * PAGE_BYTES, prefill_chunk=16)
    a = engine.add(prompts[0], Sampling(max_new_tokens=30))
    engine.step()
    b = engine.add(prompts[1], Sampling(max_new_tokens=5))
    c = engine.add(prompts[2], Sampling(max_new_tokens=5))
    engine.step()
    assert (engine.n_running, engine.n_waiting) == (2, 1)
    for request in (b, c, a):
        engine.remove(request)
    while engine.n_running or engine.n_waiting:
        assert engine.step() == []
    engine.step()
    assert pages_in_use(engine) == 0
    with pytest.raises(ValueError, match="it needs 5 pages of the key-value cache, which has 3"):
        Engine(model, cache_bytes=4 * PAGE_BYTES).add([1] * 100, Sampling(max_new_tokens=20))
    with pytest.raises(ValueError, match=f"hold no page of 32 tokens, which takes {PAGE_BYTES}"):
        Engine(model, cache_bytes=PAGE_BYTES)


@pytest.mark.parametrize("cache_bytes", [None, 1 << 20])
@pytest.mark.parametrize("prefix", [False, True])
def test_a_long_prompt_is_read_beside_decoding(model: Transformer, cache_bytes: int | None, prefix: bool) -> None:
    """Law: a running request gets a token in each step while prompts of 200 and 70 tokens are read 32 tokens a step; all texts
    are those of each alone."""
    prompts = prompts_of(5, 200, 70)
    expected = [
        generate_ids(model, [p], Sampling(max_new_tokens=n))[0] for p, n in zip(prompts, (40, 6, 6), strict=True)
    ]
    cache = PrefixCache(1 << 24) if prefix else None
    engine = Engine(model, max_batch=4, cache_bytes=cache_bytes, prefill_chunk=32, prefix_cache=cache)
    engine.add(prompts[0], Sampling(max_new_tokens=40))
    tokens: dict[int, list[int]] = {0: [engine.step()[0].token], 1: [], 2: []}
    engine.add(prompts[1], Sampling(max_new_tokens=6))
    engine.add(prompts[2], Sampling(max_new_tokens=6))
    steps = 0
    while engine.n_running or engine.n_waiting:
        events = engine.step()
        steps += 1
        for event in events:
            tokens[event.request].append(event.token)
        if steps <= 6:
            assert [event.request for event in events] == [0]
    assert [tokens[i] for i in range(3)] == expected


def test_the_lowest_number_starts_first(model: Transformer) -> None:
    """Among equals the one that came first; a preempted request keeps its place in the order."""
    engine = Engine(model, max_batch=1)
    order = {engine.add([1, 2], Sampling(max_new_tokens=2), priority=p): p for p in (3, 1, 2, 1)}
    ended = []
    while engine.n_running or engine.n_waiting:
        ended += [event.request for event in engine.step() if event.finished]
    assert ended == sorted(order, key=lambda request: (order[request], request))
    engine = Engine(model, max_batch=2, cache_bytes=6 * PAGE_BYTES)
    late = engine.add([1] * 30, Sampling(max_new_tokens=90), priority=5)
    engine.step()
    urgent = engine.add([2] * 30, Sampling(max_new_tokens=90))
    events = []
    while engine.n_running or engine.n_waiting:
        events += engine.step()
    assert engine.n_preempted == 1
    assert [event.request for event in events if event.finished] == [urgent, late]


@pytest.mark.parametrize("cache_bytes", [None, 40 * PAGE_BYTES])
def test_a_request_that_goes_while_its_prompt_is_read_leaves_no_row(
    model: Transformer, cache_bytes: int | None
) -> None:
    """A group may begin right after the last running request ended, and still be read in chunks; one of it that goes then
    takes its row along: the others keep theirs."""
    first, *prompts = prompts_of(3, 60, 50, 55)
    expected = generate_ids(model, prompts[1:], Sampling(max_new_tokens=9))
    engine = Engine(model, max_batch=4, prefill_chunk=30, cache_bytes=cache_bytes)
    engine.add(first, Sampling(max_new_tokens=2))
    engine.step()
    requests = [engine.add(prompt, Sampling(max_new_tokens=9)) for prompt in prompts]
    engine.step()  # the first one ends, and some of the prompts are read
    assert engine.n_running == 3
    engine.remove(requests[0])
    found = drain(engine)
    assert [found[request] for request in requests[1:]] == expected


@pytest.mark.parametrize("prefix", [False, True])
def test_rows_that_grow_leave_a_prompt_in_chunks_its_pages(model: Transformer, prefix: bool) -> None:
    """While a long prompt is read in many steps, running rows take pages that were free when it began: it waits again
    rather than fails, and each text is the one it would be alone."""
    prompts = prompts_of(20, 22, 150)
    settings = [Sampling(max_new_tokens=n) for n in (150, 120, 5)]
    expected = generate_ids(model, prompts, settings)
    engine = Engine(
        model,
        max_batch=4,
        prefill_chunk=1,
        cache_bytes=(1 + 11) * PAGE_BYTES,
        prefix_cache=PrefixCache(1 << 20) if prefix else None,
    )
    requests = [engine.add(prompt, one) for prompt, one in zip(prompts[:2], settings[:2], strict=True)]
    begun = {event.request: [event.token] for event in engine.step()}
    requests.append(engine.add(prompts[2], settings[2]))
    found = drain(engine)
    assert [begun.get(request, []) + found[request] for request in requests] == expected
    assert prefix or pages_in_use(engine) == 0
