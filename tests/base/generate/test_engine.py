"""The engine: requests join and leave between steps, and each gets what it would get alone."""

import pytest
import torch

from graft.base.generate.engine import Engine, Event, generate_ids
from graft.base.generate.sampling import Sampling
from graft.base.model.config import ModelConfig
from graft.base.model.transformer import Transformer

CONFIG = ModelConfig(83, d_model=32, n_layers=3, n_heads=4, n_kv_heads=2, d_head=16, d_ff=64, max_seq_len=64)


def wide_weights(config: ModelConfig) -> Transformer:
    """Logits that differ by much more than rounding."""
    built = Transformer(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in built.parameters():
        parameter.data.normal_(0, 0.3, generator=generator)
    return built.eval()


@pytest.fixture(scope="module")
def model() -> Transformer:
    return wide_weights(CONFIG)


def without_cache(model: Transformer, prompt: list[int], n: int) -> list[int]:
    """Greedy continuation by the full forward pass for every token."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(n):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


def drain(engine: Engine) -> dict[int, list[int]]:
    """All tokens of all requests until nothing is left to do."""
    tokens: dict[int, list[int]] = {}
    while engine.n_running or engine.n_waiting:
        for event in engine.step():
            tokens.setdefault(event.request, []).append(event.token)
    return tokens


@pytest.mark.parametrize("windows", [None, (True, True, True), (False, True, False)])
def test_rows_that_come_and_go_are_each_alone(windows: tuple[bool, ...] | None) -> None:
    """Law: whatever joins, ends or is removed meanwhile, a request's greedy tokens are those of the full forward pass.

    Lengths differ, a prompt longer than all before it joins late, the cache grows, rows swap places.
    """
    model = wide_weights(
        CONFIG
        if windows is None
        else ModelConfig(**{**CONFIG.__dict__, "sliding_window": 6, "sliding_layers": windows})
    )
    generator = torch.Generator().manual_seed(3)
    engine = Engine(model, max_batch=3)
    jobs = [(1, 9), (12, 3), (5, 20), (30, 7), (2, 15), (2, 15), (17, 1), (8, 30)]  # prompt length, new tokens
    prompts = {}
    for length, new in jobs[:5]:
        ids = torch.randint(0, 83, (length,), generator=generator).tolist()
        prompts[engine.add(ids, Sampling(max_new_tokens=new))] = (ids, new)
    tokens: dict[int, list[int]] = {request: [] for request in range(len(jobs))}
    steps = 0
    removed = None
    while engine.n_running or engine.n_waiting or steps < 8:
        assert engine.n_running <= 3
        for event in engine.step():
            tokens[event.request].append(event.token)
            assert event.finished == ("length" if len(tokens[event.request]) == prompts[event.request][1] else None)
        steps += 1
        if steps == 4:
            for length, new in jobs[5:]:
                ids = torch.randint(0, 83, (length,), generator=generator).tolist()
                prompts[engine.add(ids, Sampling(max_new_tokens=new))] = (ids, new)
        if steps == 6:
            removed = 2
            engine.remove(removed)
    for request, (ids, new) in prompts.items():
        expected = without_cache(model, ids, new)
        if request == removed:
            assert 0 < len(tokens[request]) < new
            assert tokens[request] == expected[: len(tokens[request])]
        else:
            assert tokens[request] == expected, f"request {request}"
    with pytest.raises(ValueError, match="request 2 is neither running nor waiting"):
        engine.remove(2)


def test_an_event_says_how_a_request_ended(model: Transformer) -> None:
    """The stop token itself is reported with `stop`; the last allowed token with `length`; a step with nothing is empty."""
    first, second = without_cache(model, [5, 6, 7], 2)
    assert first != second
    engine = Engine(model)
    assert engine.step() == []
    a = engine.add([5, 6, 7], Sampling(max_new_tokens=9, stop_ids={second}))
    assert engine.step() == [Event(a, first, None)]
    assert engine.n_running == 1
    assert engine.step() == [Event(a, second, "stop")]
    assert (engine.n_running, engine.step()) == (0, [])
    b = engine.add([5, 6, 7], Sampling(max_new_tokens=1))
    assert engine.step() == [Event(b, first, "length")]


class GivesUp:
    """A grammar that lets only token 9 come, and raises once n tokens were taken."""

    def __init__(self, n: int, *, when_asked: bool) -> None:
        self.n, self.when_asked = n, when_asked

    def matcher(self) -> "GivesUp":
        return GivesUp(self.n, when_asked=self.when_asked)

    def allowed(self) -> torch.Tensor:
        if self.when_asked and self.n == 0:
            raise ValueError("too many states")
        return torch.arange(CONFIG.vocab_size) == 9

    def advance(self, token: int) -> None:
        assert token == 9
        self.n -= 1
        if not self.when_asked and self.n == 0:
            raise ValueError("too many states")


@pytest.mark.parametrize("when_asked", [True, False])
def test_a_grammar_that_gives_up_ends_its_request_alone(model: Transformer, when_asked: bool) -> None:
    """Law: the row beside it gets what it would get alone; `generate_ids` names the prompt."""
    engine = Engine(model)
    failing = engine.add([4, 5], Sampling(max_new_tokens=8, grammar=GivesUp(2, when_asked=when_asked)))
    beside = engine.add([5, 6, 7], Sampling(max_new_tokens=8))
    events: list[Event] = []
    while engine.n_running or engine.n_waiting:
        events += engine.step()
    assert [event.token for event in events if event.request == beside] == without_cache(model, [5, 6, 7], 8)
    own = [event for event in events if event.request == failing]
    assert [event.token for event in own[:2]] == [9, 9]
    assert len(own) == (3 if when_asked else 2)
    assert (own[-1].finished, own[-1].failure) == ("error", "too many states")
    with pytest.raises(ValueError, match="prompt 1: too many states"):
        generate_ids(
            model,
            [[1], [2]],
            [Sampling(max_new_tokens=9), Sampling(max_new_tokens=9, grammar=GivesUp(1, when_asked=when_asked))],
        )


def test_each_request_has_its_own_settings(model: Transformer) -> None:
    """Law: greedy and sampled rows in one batch, two temperatures and seeds, are each what they are alone."""
    settings = [
        Sampling(max_new_tokens=12),
        Sampling(1.5, max_new_tokens=12, seed=1),
        Sampling(1.5, max_new_tokens=12, seed=2),
        Sampling(0.7, top_k=5, max_new_tokens=12, seed=1),
        Sampling(1.5, top_p=0.8, max_new_tokens=12, seed=1),
    ]
    together = generate_ids(model, [[3, 4]] * 5, settings)
    alone = [generate_ids(model, [[3, 4]], [one])[0] for one in settings]
    assert together == alone
    assert len({tuple(row) for row in together}) == 5


def test_training_mode_comes_back_and_gradients_are_not_recorded(model: Transformer) -> None:
    """GRPO's case: a model in training mode generates and goes on training."""
    model.train()
    generate_ids(model, [[1, 2, 3]], Sampling(max_new_tokens=3))
    assert model.training
    model.eval()


def test_requests_that_can_not_fit_are_refused_when_added(model: Transformer) -> None:
    engine = Engine(model, max_batch=2)
    with pytest.raises(ValueError, match=r"has 60 tokens; with max_new_tokens=5 that is more than .* max_seq_len=64"):
        engine.add([1] * 60, Sampling(max_new_tokens=5))
    with pytest.raises(ValueError, match="holds id -1"):
        engine.add([-1], Sampling(max_new_tokens=2))
    with pytest.raises(ValueError, match="no token"):
        engine.add([], Sampling())
    with pytest.raises(ValueError, match="adapter 'x' is named, but the model has no bank"):
        engine.add([1], Sampling(max_new_tokens=2), adapter="x")
    with pytest.raises(ValueError, match="max_batch=0 must be >= 1"):
        Engine(model, max_batch=0)
    assert (engine.n_running, engine.n_waiting) == (0, 0)


def test_weights_that_are_not_finite_are_named() -> None:
    """Today's silence: NaN in a weight gave token 0 for ever, or a traceback with temperature 1."""
    model = wide_weights(CONFIG)
    model.model.layers[1].mlp.up_proj.weight.data[3, 3] = torch.nan
    engine = Engine(model)
    engine.add([1, 2], Sampling(max_new_tokens=2))
    with pytest.raises(ValueError, match="logits hold NaN or infinity"):
        engine.step()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_the_short_decoding_path_is_the_layers_own_forward(qk_norm: bool, bias: bool) -> None:
    """Law: one token through the compiled loops = the same token through forward, which a gradient mode switches to."""
    model = wide_weights(
        ModelConfig(**{**CONFIG.__dict__, "qk_norm": qk_norm, "attention_bias": bias, "attention_out_bias": bias})
    )
    ids = torch.randint(0, 83, (3, 9), generator=torch.Generator().manual_seed(2))
    logits = []
    for short in (True, False):
        cache = model.new_cache(3, 16)
        with torch.no_grad():
            model(ids[:, :8], cache=cache)
        with torch.set_grad_enabled(not short):
            logits.append(model(ids[:, 8:], cache=cache).detach())
    scale = logits[1].abs().max().item()
    torch.testing.assert_close(logits[0], logits[1], atol=1e-5 * scale, rtol=0)
    assert not torch.equal(logits[0], logits[1]), "both took one path, so nothing was compared"


def test_log_probabilities_are_the_full_models(model: Transformer) -> None:
    """Parity with log_softmax of the uncached forward pass: the chosen token's and the likeliest ones', before temperature.

    A neighbour that asks for none gets none, and filters change nothing.
    """
    prompt = [5, 6, 7]
    engine = Engine(model)
    plain = engine.add(prompt, Sampling(max_new_tokens=4))
    asked = engine.add(prompt, Sampling(0.7, top_k=3, max_new_tokens=4, seed=3, logprobs=5))
    bare = engine.add(prompt, Sampling(max_new_tokens=4, logprobs=0))
    events: dict[int, list[Event]] = {plain: [], asked: [], bare: []}
    while engine.n_running or engine.n_waiting:
        for event in engine.step():
            events[event.request].append(event)
    assert [event.logprob for event in events[plain]] == [None] * 4
    assert all(event.logprob is not None and event.logprob.top == [] for event in events[bare])
    ids = list(prompt)
    for event in events[asked]:
        with torch.no_grad():
            expected = model(torch.tensor([ids]))[0, -1].log_softmax(-1)
        assert event.logprob is not None
        # 1e-4 nats: float32 logits of about 10 summed in another order
        assert event.logprob.logprob == pytest.approx(float(expected[event.token]), abs=1e-4)
        assert [index for index, _ in event.logprob.top] == expected.topk(5).indices.tolist()
        assert [value for _, value in event.logprob.top] == pytest.approx(expected.topk(5).values.tolist(), abs=1e-4)
        ids.append(event.token)
    penalized = engine.add(prompt, Sampling(max_new_tokens=1, repetition_penalty=9.0, logprobs=0))
    [event] = [event for event in engine.step() if event.request == penalized]
    with torch.no_grad():
        expected = model(torch.tensor([prompt]))[0, -1].log_softmax(-1)
    assert event.logprob is not None
    assert event.logprob.logprob == pytest.approx(float(expected[event.token]), abs=1e-4)
    with pytest.raises(ValueError, match="logprobs=-1 must be >= 0"):
        Sampling(logprobs=-1)
