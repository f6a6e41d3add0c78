"""Speculative decoding: whatever is guessed, what comes out is the model's own text."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from graft.base.generate.engine import Engine, generate_ids
from graft.base.generate.requests import Request
from graft.base.generate.sampling import Sampling, filter_logits
from graft.base.generate.speculative import ModelDraft, NgramDraft, Pace
from graft.base.model.config import ModelConfig
from graft.base.model.transformer import Transformer

CONFIG = ModelConfig(83, d_model=32, n_layers=3, n_heads=4, n_kv_heads=2, d_head=16, d_ff=64, max_seq_len=160)


def weights(config: ModelConfig, scale: float = 0.3, seed: int = 0) -> Transformer:
    built = Transformer(config)
    generator = torch.Generator().manual_seed(seed)
    for parameter in built.parameters():
        parameter.data.normal_(0, scale, generator=generator)
    return built.eval()


@pytest.fixture(scope="module")
def model() -> Transformer:
    return weights(CONFIG)


class Always(Pace):
    """Judges whatever is guessed, so that tests meet it."""

    def wants(self, n_rows: int) -> bool:
        return True

    def trim(self, drafts: Sequence[list[int]]) -> list[list[int]]:
        return list(drafts)

    def judged(self, n_rows: int, n_columns: int, seconds: float) -> None:
        pass


class Text:
    """What the look-up and the pace ask of a request."""

    def __init__(self) -> None:
        self.tokens: list[int] = []


class Oracle:
    """Guesses a known text, wrong at every `bad`-th place."""

    is_free = True

    def __init__(self, texts: dict[int, list[int]], bad: int) -> None:
        self.texts, self.bad = texts, bad

    def propose(self, requests: Sequence[Request], limits: Sequence[int]) -> list[list[int]]:
        found = []
        for each, limit in zip(requests, limits, strict=True):
            n = len(each.produced)
            guess = self.texts[each.id][n : n + limit]
            found.append([(token + 1) % 83 if (n + i) % self.bad == 0 else token for i, token in enumerate(guess)])
        return found

    def forget(self, request: Request) -> None:
        pass


def run(engine: Engine, jobs: Sequence[tuple[list[int], Sampling]]) -> list[list[int]]:
    """All tokens of each job; a new one joins every other step."""
    tokens: dict[int, list[int]] = {}
    waiting = list(jobs)
    while waiting or engine.n_running or engine.n_waiting:
        if waiting:
            tokens[engine.add(*waiting.pop(0))] = []
        for event in engine.step():
            tokens[event.request].append(event.token)
    return list(tokens.values())


def jobs_of(n: int, **sampling: Any) -> list[tuple[list[int], Sampling]]:
    generator = torch.Generator().manual_seed(3)
    return [
        (torch.randint(0, 83, (3 + 5 * i % 17,), generator=generator).tolist(),
         Sampling(max_new_tokens=20 + 7 * i, seed=i, **sampling))
        for i in range(n)
    ]  # fmt: skip


@pytest.mark.parametrize("windows", [None, (False, True, False)])
@pytest.mark.parametrize("cache_bytes", [None, 1 << 20])
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.2, "top_p": 0.9}, {"repetition_penalty": 1.3}])
def test_guesses_change_no_token(
    sampling: dict[str, Any], cache_bytes: int | None, windows: tuple[bool, ...] | None
) -> None:
    """Law: with guesses that are right, wrong in the middle or absent, in rows that join and end, each text is the one that
    the engine writes alone without guesses, greedy or drawn with the same seed. Most guesses are accepted."""
    fields = {} if windows is None else {"sliding_window": 9, "sliding_layers": windows}
    model = weights(ModelConfig(**{**CONFIG.__dict__, **fields}))
    jobs = jobs_of(5, **sampling)
    expected = [generate_ids(model, [prompt], [one])[0] for prompt, one in jobs]
    for bad in (5, 1000):
        engine = Engine(model, max_batch=3, drafter=Oracle(dict(enumerate(expected)), bad), cache_bytes=cache_bytes)
        engine.pace = Always()
        assert run(engine, jobs) == expected
        assert engine.n_accepted > 0.4 * engine.n_drafted > 20
        if bad == 5:
            assert engine.n_accepted < engine.n_drafted


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_draft_model_that_is_the_model(model: Transformer, temperature: float) -> None:
    """Law: a draft model with the model's own weights is always right, also when it samples, since it draws with copies of
    the same random numbers; rows join, end and change their places meanwhile."""
    jobs = jobs_of(5, temperature=temperature)
    expected = [generate_ids(model, [prompt], [one])[0] for prompt, one in jobs]
    engine = Engine(model, max_batch=3, drafter=ModelDraft(model, vocab_size=83))
    engine.pace = Always()
    assert run(engine, jobs) == expected
    assert engine.n_accepted == engine.n_drafted > 50


def test_another_draft_model(model: Transformer) -> None:
    """Law: a small model of other weights changes no token either, though it is often wrong."""
    small = weights(
        ModelConfig(83, d_model=16, n_layers=1, n_heads=1, n_kv_heads=1, d_head=16, d_ff=16, max_seq_len=90)
    )
    jobs = jobs_of(4, temperature=0.7)
    expected = [generate_ids(model, [prompt], [one])[0] for prompt, one in jobs]
    engine = Engine(model, max_batch=4, drafter=ModelDraft(small, vocab_size=83))
    engine.pace = Always()
    assert run(engine, jobs) == expected
    assert 0 < engine.n_accepted < engine.n_drafted
    with pytest.raises(ValueError, match="the draft model has 83 ids, the model 90"):
        ModelDraft(small, vocab_size=90)


def test_sampling_keeps_the_distribution() -> None:
    """Chi-square of the second token against the exact probabilities, where the draft is always the likeliest token: the case
    in which a wrong rule (keep whatever was guessed) would show. 14 cells, 1,500 draws; the 0.001 quantile is 34.5."""
    config = ModelConfig(14, d_model=8, n_layers=1, n_heads=1, n_kv_heads=1, d_head=8, d_ff=8, max_seq_len=8)
    model = weights(config, scale=0.7)
    prompt, n = [1, 2], 1500
    with torch.no_grad():
        first = filter_logits(model(torch.tensor([prompt]))[:, -1], temperature=1.0)[0]
        after = filter_logits(
            model(torch.tensor([[*prompt, i] for i in range(14)]))[:, -1], temperature=1.0
        )  # (14, 14)
    exact = first @ after  # of the second token

    class Likeliest:
        is_free = True

        def propose(self, requests: Sequence[Request], limits: Sequence[int]) -> list[list[int]]:
            return [
                [int(after[each.produced[-1]].argmax())][:limit] for each, limit in zip(requests, limits, strict=True)
            ]

        def forget(self, request: Request) -> None:
            pass

    engine = Engine(model, max_batch=500, drafter=Likeliest())
    engine.pace = Always()
    for seed in range(n):
        engine.add(prompt, Sampling(1.0, max_new_tokens=3, seed=seed))
    tokens: dict[int, list[int]] = {}
    while engine.n_running or engine.n_waiting:
        for event in engine.step():
            tokens.setdefault(event.request, []).append(event.token)
    assert engine.n_accepted > n / 10
    counts = Counter(text[1] for text in tokens.values())
    chi_square = sum((counts[i] - n * p) ** 2 / (n * p) for i, p in enumerate(exact.tolist()))
    assert chi_square < 34.5


def test_a_stop_token_among_the_guesses_ends_the_text(model: Transformer) -> None:
    """What was guessed behind a stop token or the last allowed one never comes out; a text may be removed in its last step."""
    [text] = generate_ids(model, [[5, 6]], Sampling(max_new_tokens=20))
    stop = next(token for i, token in enumerate(text) if i >= 6 and token not in text[:i])
    engine = Engine(model, drafter=Oracle({0: text, 1: text}, 1000))
    engine.pace = Always()
    engine.add([5, 6], Sampling(max_new_tokens=20, stop_ids={stop}))
    cut = engine.add([5, 6], Sampling(max_new_tokens=9))
    events = []
    while engine.n_running or engine.n_waiting:
        events += engine.step()
        if any(event.request == cut and event.finished for event in events[-8:]):
            engine.remove(cut)  # it ended in this step: nothing to do
    for request, length, how in ((0, text.index(stop) + 1, "stop"), (1, 9, "length")):
        own = [event for event in events if event.request == request]
        assert [event.token for event in own] == text[:length]
        assert [event.finished for event in own] == [None] * (length - 1) + [how]
    assert engine.step() == []
    with pytest.raises(ValueError, match="request 0 is neither"):
        engine.remove(0)


def test_ngram_look_up_by_hand() -> None:
    """Worked by hand. Of 1 2 3 9 1 2 3 the last three tokens occurred before, followed by 9 1 2 3 and, copied on, 9 1 ...; the
    longest match wins over a later shorter one; without a match of two tokens there is no draft."""
    draft = NgramDraft()

    texts: Any = [Text() for _ in range(4)]

    def propose(tokens: list[int], limit: int, request: int = 0) -> list[int]:
        texts[request].tokens = tokens
        return draft.propose([texts[request]], [limit])[0]

    assert propose([1, 2, 3, 9, 1, 2, 3], 3) == [9, 1, 2]
    assert propose([1, 2, 3, 9, 1, 2, 3, 9, 1], 5) == [2, 3, 9, 1, 2]  # the copy goes on past the text's end
    assert propose([1, 2, 3, 7, 5, 2, 3, 8, 1, 2, 3], 1, request=1) == [
        7
    ]  # three tokens, though "2 3" came later with 8
    assert propose([4, 5, 6, 5], 4, request=2) == []
    assert propose([1, 2, 1, 2], 0, request=3) == []
    draft.forget(texts[0])
    assert propose([1, 9], 4) == []
    with pytest.raises(ValueError, match="shortest=3 and longest=2"):
        NgramDraft(longest=2, shortest=3)


def test_the_pace_takes_what_pays() -> None:
    """Worked by hand. A step takes 1 s. Where a column of guesses costs another 0.5 s and none is right, it only costs: given up,
    it is tried again rarely. Where all are right and a column costs 0.1 s, eight columns are best taken whole, further ones
    being cheaper yet until they are measured. One row's guess among eight rows is not worth its column."""
    pace = Pace()
    request: Any = Text()
    assert not pace.wants(2)
    for _ in range(2):
        pace.plain(2, 1.0)
    assert pace.wants(2)
    assert not pace.wants(1)  # of one row nothing is known yet
    n_judged = 0
    for _ in range(2000):
        if not pace.wants(2):
            pace.plain(2, 1.0)
            continue
        n_judged += 1
        drafts = pace.trim([[7] * 4, [7] * 4])
        assert drafts[0]
        pace.judged(2, len(drafts[0]), 1 + 0.5 * len(drafts[0]))
        for draft in drafts:
            pace.learn(request, len(draft), 0)
    assert 1 < n_judged < 60  # each costs half a step: under 2% of the time in all
    for _ in range(30):
        pace.judged(2, 1, 1.1)
        pace.learn(request, 4, 4)
    assert pace.trim([[7] * 8, [7] * 8]) == [[7] * 8, [7] * 8]
    pace.judged(2, 8, 9.0)
    assert len(pace.trim([[7] * 8, [7] * 8])[0]) < 8  # eight at nine times a step's time don't pay
    pace.plain(8, 1.0)
    pace.plain(8, 1.0)
    pace.judged(8, 1, 1.4)
    assert pace.trim([[7] * 4, *[[]] * 7]) == [[]] * 8


def test_sizes_double_and_shrink() -> None:
    """Worked by hand: 4 right of 4 -> 8; 2 right of 8 -> 3; a short draft that was right shrinks nothing."""
    pace = Pace()
    request: Any = Text()
    assert pace.size(request) == 4
    pace.learn(request, 4, 4)
    assert pace.size(request) == 8
    pace.learn(request, 1, 1)
    assert pace.size(request) == 8
    pace.learn(request, 8, 2)
    assert pace.size(request) == 3


def test_free_guesses_are_compared_before_they_are_judged() -> None:
    """Law: what guesses for nothing is believed after plain steps have shown it right, and never when they show it wrong."""
    for right, believed in ((1, True), (0, False)):
        pace = Pace(is_free=True)
        for _ in range(200):
            pace.plain(1, 1.0)
            pace.compared(right, 1)
        assert bool(pace.trim([[5, 6]])[0]) == believed
