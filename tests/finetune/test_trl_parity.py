"""Parity with TRL + PEFT: the same rows, order, rate and adapter give the same losses, step by step (bench/beside_trl.py)."""

import re
from pathlib import Path
from typing import Any

import pytest

from graft.base.model.config import ModelConfig
from graft.base.model.huggingface import save_model
from graft.base.model.transformer import Transformer, initialize_
from graft.base.pretrain import with_special_ids
from graft.base.tokenizer.tokenizer import Tokenizer

WORDS = re.findall(r"\w+", "the fox says hello to the dog who are you a small model that learns quick brown words")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    (folder / "a.txt").write_text(" ".join(WORDS * 20), encoding="utf-8")
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer.train([folder / "a.txt"], vocab_size=310, pattern="gpt4", special_tokens=specials)
    tokenizer.save(folder)
    config = ModelConfig(tokenizer.vocab_size, 32, 2, 4, 2, 8, 64, 64, qk_norm=False)
    model = Transformer(with_special_ids(config, tokenizer))
    initialize_(model, seed=1)
    save_model(model, folder)
    return folder


def strings(i: int) -> dict[str, Any]:
    a, b, c = (WORDS[(i * k) % len(WORDS)] for k in (3, 5, 7))
    return {"prompt": f"Who says {a} {b}?\nAnswer:", "completion": f" {c} {a}"}


def conversation(i: int) -> dict[str, Any]:
    a, b, c = (WORDS[(i * k) % len(WORDS)] for k in (3, 5, 7))
    said = [("user", f"{a} {b}?"), ("assistant", c), ("user", b), ("assistant", f"{c} {a} {b}")]
    return {"messages": [{"role": role, "content": content} for role, content in said]}


@pytest.mark.parametrize("row", [strings, conversation], ids=lambda f: f.__name__)
@pytest.mark.filterwarnings("ignore")  # of four libraries about each other
def test_the_losses_of_trl(row: Any, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of unequal length in batches of 3, the last one smaller: masks, padding, the mean over labels and AdamW agree.

    The rate is high, so that a wrong update shows in the next losses (by 1e-2 and more). float32 sums in another order on each
    side, and AdamW's first updates are of the rate's size however small a gradient is: 3e-5 was seen after seven.
    """
    pytest.importorskip("trl", reason="TRL is the peer")
    pytest.importorskip("peft", reason="PEFT is the peer")
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "bench"))
    from beside_trl import Ours, trainer_beside

    steps = 8
    rows = [row(i) for i in range(3 * steps - 1)]
    template = "chatml" if row is conversation else None
    ours = Ours(base, rows, method="lora", steps=steps, batch_size=3, rate=2e-2, chat_template=template)
    trainer, theirs = trainer_beside(ours, base, steps=steps)
    mine = [ours.step() for _ in range(steps)]
    trainer.train()
    assert mine == pytest.approx(theirs, rel=0, abs=1e-4)
    assert mine[-1] < mine[0] - 0.1
