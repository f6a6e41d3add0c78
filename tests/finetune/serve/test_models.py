"""The server's adapters: a byte budget with pins, and stacks of several, without a server around them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from graft.base.tokenizer.tokenizer import Tokenizer
from graft.finetune.adapters.files import read_adapter
from graft.finetune.adapters.selection import use_adapters
from graft.finetune.adapters.shelf import resident_bytes
from graft.finetune.loading import load_model

pytest.importorskip("fastapi")

from graft.finetune.serve.adapters import Models
from graft.finetune.serve.errors import ApiError

IDS = torch.arange(20).view(1, 20)


@pytest.fixture
def models_of(served_base: Path, adapters_dir: Path) -> Callable[..., Models]:
    """Models with room for so many adapters."""

    def make(room: float | None = None, **options: Any) -> Models:
        model = load_model(served_base).requires_grad_(False)
        first = sorted(path for path in adapters_dir.iterdir())[0]
        size = resident_bytes(read_adapter(first), model)
        budget = None if room is None else int(room * size)
        return Models(
            served_base, model, Tokenizer.load(served_base), folder=adapters_dir, budget_bytes=budget, **options
        )

    return make


def load(models: Models, name: str) -> None:
    models.attach(name, models.read(name, models.find(name)))


def loaded(models: Models) -> list[str]:
    return [name.partition("#")[0] for name in models.bank.names]


def test_the_least_recent_leaves_within_the_budget(models_of: Callable[..., Models]) -> None:
    """Worked by hand, with room for two: a, b, a again, then c sends b away; a pinned one stays, one in use goes when it ends."""
    names = models_of().names()[1:]
    a, b, c, d = names[:4]
    models = models_of(2.1, pinned=[a])
    load(models, a)
    load(models, b)
    load(models, c)
    assert loaded(models) == [a, c]
    lease = models.lease(c)
    assert lease is not None
    load(models, d)
    assert loaded(models) == [a, c, d]  # c's request runs
    lease.close()
    models.sweep()
    assert loaded(models) == [a, d]
    with pytest.raises(ApiError, match=r"more than the server's whole budget of .*; raise --adapter-budget"):
        load(models_of(0.5), a)
    with pytest.raises(ValueError, match="pinned adapter 'nobody' does not exist; there are "):
        models_of(pinned=["nobody"])


def test_a_stack_is_served(models_of: Callable[..., Models], adapters_dir: Path, served_base: Path) -> None:
    """Law: the model "a:0.7,b:0.3" answers as the base with both updates added by hand; it leaves when one of them changes."""
    models = models_of()
    a, b = models.names()[1:3]
    stack = f"{a}:0.7,{b}:0.3"
    load(models, stack)
    expected = load_model(served_base)
    with torch.no_grad():
        for name, weight in ((a, 0.7), (b, 0.3)):
            for path, (low_a, low_b, scale) in read_adapter(adapters_dir / name).layers.items():
                expected.get_submodule(path).weight += weight * scale * (low_b @ low_a)
        with use_adapters(models.bank.model, models.bank.names[0]):
            torch.testing.assert_close(models.bank.model(IDS), expected(IDS), atol=1e-4, rtol=1e-4)
    load(models, a)
    assert len(loaded(models)) == 2
    load(models, a)  # a new version
    assert loaded(models) == [a]
    load(models, stack)
    models.detach(b)
    assert loaded(models) == [a]
    for spec, status in ((f"{a}:0.5,nobody:0.5", 404), (f"{a}:x", 404), (f"{a}:1,{a}:1", 404)):
        with pytest.raises(ApiError) as caught:
            models.find(spec)
        assert caught.value.status == status
