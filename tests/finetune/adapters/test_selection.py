"""Who chooses the adapter: blocks of one thread over the model's default, rows, users that keep an adapter loaded."""

import copy
import gc
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

import graft
from graft.base.model.transformer import Transformer
from graft.base.tokenizer.tokenizer import Tokenizer
from graft.finetune.adapters.bank import AdapterBank
from graft.finetune.adapters.files import save_adapter
from graft.finetune.adapters.lora import LoraConfig, LowRank, attach_lora, lora_layers, wrapped
from graft.finetune.adapters.selection import adapters_off, registry_of, use_adapters
from graft.finetune.loading import load_model

IDS = torch.randint(0, 290, (3, 15), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def bank(base_dir: Path, tmp_path: Path) -> AdapterBank:
    """A base with adapters a (rank 4, every linear) and b (rank 3, two linears), strong enough to change every answer."""
    for name, seed, config in (
        ("a", 1, LoraConfig(rank=4)),
        ("b", 2, LoraConfig(rank=3, targets=("q_proj", "up_proj"))),
    ):
        model = load_model(base_dir, dtype=None)
        attach_lora(model, config, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        for _, layer in lora_layers(model):
            layer.updates["default"].lora_b.data.normal_(0, 0.2, generator=generator)
        save_adapter(model, tmp_path / name, config, base=str(base_dir))
    bank = AdapterBank(load_model(base_dir, dtype=None).requires_grad_(False))
    bank.load("a", tmp_path / "a")
    bank.load("b", tmp_path / "b")
    return bank


def logits(model: Transformer, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(ids)


def by_name(bank: AdapterBank) -> dict[str | None, Tensor]:
    """Each adapter's logits by way of `use`."""
    found = {}
    for name in ("a", "b", None):
        bank.use(name)
        found[name] = logits(bank.model)
    assert not torch.allclose(found["a"], found["b"], atol=1e-2)
    return found


def test_blocks_nest_over_the_default(bank: AdapterBank) -> None:
    """Law: the innermost block wins, `use` inside a block sets the default alone, an error inside leaves no trace."""
    expected, model = by_name(bank), bank.model
    bank.use("b")
    with use_adapters(model, "a"):
        assert torch.equal(logits(model), expected["a"])
        with graft.adapters_off(model):
            assert torch.equal(logits(model), expected[None])
            with adapters_off(model), use_adapters(model, "b"):
                assert torch.equal(logits(model), expected["b"])
            assert torch.equal(logits(model), expected[None])
        bank.use(None)
        assert torch.equal(logits(model), expected["a"]), "`use` must not change an open block's choice"
    assert torch.equal(logits(model), expected[None])
    with pytest.raises(RuntimeError, match="mine"), use_adapters(model, "a"):
        raise RuntimeError("mine")
    assert torch.equal(logits(model), expected[None])
    with pytest.raises(ValueError, match="no adapter 'c' is loaded; loaded are: a, b"), use_adapters(model, "c"):
        pass
    assert not registry_of(model).users


def test_use_inside_rows_changes_the_default_alone(bank: AdapterBank) -> None:
    """Law: rows are what was named, whatever `use` sets meanwhile."""
    expected = by_name(bank)
    with bank.rows(["b", None, "a"]):
        bank.use("a")
        mixed = logits(bank.model)
    for row, name in enumerate(["b", None, "a"]):
        torch.testing.assert_close(mixed[row], expected[name][row], atol=2e-5, rtol=1e-5)
    assert bank.active == "a"
    assert torch.equal(logits(bank.model), expected["a"])


def test_a_selection_is_kept_over_steps_and_follows_changes(bank: AdapterBank, tmp_path: Path) -> None:
    """Law: entered again it gives the same; after an adapter is loaded, moved or trained, what is true then."""
    expected, model = by_name(bank), bank.model
    kept = bank.rows(["a", None, "b"])
    first = kept.layers
    for _ in range(2):
        with kept:
            assert torch.equal(logits(model)[1], expected[None][1])
    assert kept.layers is first, "nothing changed, so nothing is stacked again"
    model.double()
    with kept:
        torch.testing.assert_close(logits(model)[0].float(), expected["a"][0], atol=2e-5, rtol=1e-5)
    trained = next(layer.updates["a"] for _, layer in lora_layers(model))
    trained.lora_b.requires_grad_(True)
    kept = bank.rows(["a", None, "b"])
    with kept:
        before = logits(model)
    with torch.no_grad():
        trained.lora_b.mul_(3.0)  # as an optimizer does
    with kept:
        after = logits(model)
    assert (after[0] - before[0]).abs().max() > 1e-3
    assert torch.equal(after[1:], before[1:])


def test_gradients_of_rows_are_each_rows_own(bank: AdapterBank) -> None:
    """Law: training adapters by rows gives each the gradient of its rows alone, as one call per adapter does."""
    model = bank.model
    for _, layer in lora_layers(model):
        layer.adapters.requires_grad_(True)
    with bank.rows(["a", "b", None]):
        model(IDS).square().sum().backward()
    mixed = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for row, name in enumerate(["a", "b"]):
        with use_adapters(model, name):
            model(IDS[row : row + 1]).square().sum().backward()
    alone = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert mixed.keys() == alone.keys()
    for name, grad in alone.items():
        torch.testing.assert_close(mixed[name], grad, atol=1e-4 * grad.abs().max().item(), rtol=1e-4)


def test_eight_threads_with_three_adapters(bank: AdapterBank, base_dir: Path) -> None:
    """Law: 200 calls of graft.generate from eight threads answer as one thread does, with swaps of the default meanwhile."""
    model, tokenizer = bank.model, Tokenizer.load(base_dir)
    prompts = ["the cat", "a bird sang", "rivers run to"]
    choices: list[str | None] = ["a", "b", None]

    def answer(i: int) -> list[str]:
        chosen = [prompts[i % 3], prompts[(i // 3) % 3]]
        names = [choices[i % 3], choices[(i // 2) % 3]]
        return graft.generate(model, tokenizer, chosen, max_new_tokens=4, adapters=names)

    expected = [answer(i) for i in range(18)]
    assert len({str(texts) for texts in expected}) > 9, "the adapters answer differently"
    found: dict[int, list[str]] = {}
    errors: list[BaseException] = []

    def work(thread: int) -> None:
        try:
            for i in range(thread, 200, 8):
                found[i] = answer(i % 18)
                bank.use(choices[i % 3])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(found) == 200
    assert all(found[i] == expected[i % 18] for i in found)


def test_an_adapter_in_use_stays(bank: AdapterBank, tmp_path: Path) -> None:
    """Law: removing or replacing an adapter with users is refused with their number; afterwards it works."""
    kept, other = bank.rows(["a", None, "b"]), bank.rows(["a", "a", "a"])
    with pytest.raises(ValueError, match="adapter 'a' can't be removed: it has 2 users"):
        bank.unload("a")
    with pytest.raises(ValueError, match="adapter 'b' can't be replaced: it has 1 user "):
        bank.load("b", tmp_path / "b")
    kept.close()
    kept.close()
    bank.load("b", tmp_path / "b")
    with pytest.raises(ValueError, match="it has 1 user "):
        bank.unload("a")
    del other
    gc.collect()
    bank.registry.hold("a")
    with pytest.raises(ValueError, match="it has 1 user "):
        bank.unload("a")
    bank.registry.release("a")
    bank.unload("a")
    with pytest.raises(ValueError, match="no adapter 'a' is loaded; loaded are: b"):
        bank.rows(["a"])


def test_adapters_are_part_of_the_model(bank: AdapterBank) -> None:
    """Law: registered, so they move with .to(), are in state_dict, and a deep copy has its own; a dotted name works."""
    model = bank.model
    keys = [key for key in model.state_dict() if ".adapters.a.lora_a" in key]
    assert len(keys) == 14
    expected = by_name(bank)
    bank.use("a")
    twin = copy.deepcopy(model)
    registry_of(twin).default = "b"
    assert torch.equal(logits(twin), expected["b"])
    assert torch.equal(logits(model), expected["a"])
    layer = wrapped(model, "model.layers.0.mlp.up_proj")
    layer.add("v1.0%", LowRank(torch.zeros(1, 64), torch.zeros(128, 1), 1.0, trained=False))
    assert "model.layers.0.mlp.up_proj.adapters.v1%2E0%25.lora_b" in model.state_dict()
    with use_adapters(model, "v1.0%"):
        assert torch.equal(logits(model), expected[None])


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's own way with Functions
def test_one_graph_whatever_is_selected(bank: AdapterBank) -> None:
    """Law: torch.compile finds no break (fullgraph=True raises at one), follows each thread's choice, and other rows of the
    same number need no new graph."""
    model, n_graphs = bank.model, 0

    def backend(module: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        nonlocal n_graphs
        n_graphs += 1
        return module

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    choices: list[str | list[str | None] | None] = [None, "a", "b", ["a", None, "b"], ["b", "a", None], "a", None]
    for choice in choices:
        with torch.no_grad(), use_adapters(model, choice):
            torch.testing.assert_close(compiled(IDS), model(IDS), atol=2e-5, rtol=1e-5)
    assert n_graphs == 4


def test_a_dropped_selection_of_several_adapters_is_no_user(bank: AdapterBank) -> None:
    """Law: a selection of mixed rows ends with its last reference, not at the next garbage collection."""
    gc.disable()
    try:
        selection = bank.rows(["a", "b", None])
        with selection:
            bank.model(IDS)
        assert bank.registry.users == {"a": 1, "b": 1}
        del selection
        assert bank.registry.users == {}
    finally:
        gc.enable()
