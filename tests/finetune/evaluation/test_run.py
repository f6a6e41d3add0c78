"""What is read, what is refused, several adapters on one base."""

import json
import math
from pathlib import Path

import pytest
import torch

from graft.base.tokenizer.tokenizer import Tokenizer
from graft.finetune.adapters.files import save_adapter
from graft.finetune.adapters.lora import LoraConfig, attach_lora, lora_layers
from graft.finetune.data.records import Record
from graft.finetune.evaluation.run import compare, run_evaluate
from graft.finetune.loading import load_model


def rows() -> list[Record]:
    return [Record(f"row {i}", prompt="the cat " * n, completion=f" {n}") for i, n in enumerate([3, 1, 2, 5, 4])]


def test_long_texts_in_windows(base_dir: Path, text_file: Path, tmp_path: Path) -> None:
    """Worked out apart, token by token: each but the first of a document is predicted once, from its window's start."""
    model, tokenizer = load_model(base_dir), Tokenizer.load(base_dir)
    texts = ["the cat sat on the mat and looked at the bird. " * 12, "a bird sang"]
    (tmp_path / "two.txt").write_text("<|endoftext|>".join(texts))
    window, total, count = model.config.max_seq_len, 0.0, 0
    for text in texts:
        ids = [*tokenizer.encode(text).tolist(), tokenizer.eos_token_id]
        for i in range(1, len(ids)):
            start = (i - 1) // window * window
            if start == i - 1 or i == 1:
                with torch.no_grad():
                    log_p = model(torch.tensor([ids[start : start + window]]))[0].log_softmax(-1)
            total -= log_p[i - 1 - start, ids[i]].item()
            count += 1
    assert count > 2 * window
    figures = run_evaluate(base_dir, tmp_path / "two.txt", device="cpu")
    assert figures["n_documents"] == 2
    assert figures["n_tokens"] == count
    assert figures["loss"] == pytest.approx(total / count, rel=1e-5)  # float32 sums in another order
    n_bytes = sum(len(text.encode()) for text in texts)
    assert figures["bits_per_byte"] == pytest.approx(total / math.log(2) / n_bytes, rel=1e-5)


def test_one_token_is_scored_from_nothing(base_dir: Path, tmp_path: Path) -> None:
    """Law: a document of one byte has one label, its end."""
    (tmp_path / "one.txt").write_text("x")
    assert run_evaluate(base_dir, tmp_path / "one.txt", device="cpu")["n_tokens"] == 1


def test_what_cannot_be_scored(base_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "c"}]}))
    with pytest.raises(ValueError, match=r"rows\.jsonl line 1"):
        run_evaluate(base_dir, path, device="cpu")
    path.write_text("\n".join(json.dumps({"prompt": "a", "completion": "b"}) for _ in range(2)))
    assert run_evaluate(base_dir, path, limit=1, device="cpu")["n_records"] == 1
    for limit in (0, -1):
        with pytest.raises(ValueError, match=f"limit={limit} must be >= 1"):
            run_evaluate(base_dir, path, limit=limit, device="cpu")
    (tmp_path / "none.txt").write_text("<|endoftext|>")
    with pytest.raises(ValueError, match="holds no text to score"):
        run_evaluate(base_dir, tmp_path / "none.txt", device="cpu")
    with pytest.raises(FileNotFoundError, match=r"gone\.jsonl"):
        run_evaluate(base_dir, tmp_path / "gone.jsonl", device="cpu")


def test_rows_that_cannot_be_scored_are_listed_together_or_dropped(base_dir: Path, tmp_path: Path) -> None:
    """Law: empty rows, rows without an answer and prompts without room are all in one message, or counted."""
    path = tmp_path / "rows.jsonl"
    rows = [
        {"prompt": "a", "completion": " b"}, {"prompt": "c", "completion": None}, {"prompt": "the cat " * 90, "completion": " b"},
        {"prompt": "d", "completion": " "}, {"prompt": "the cat " * 91, "completion": " b"},
    ]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(
        ValueError,
        match=r"4 rows can't be used: .*line 2: completion is null.*line 4: completion is empty.*line 3: the prompt has \d+ tok"
        r".*line 5: the prompt has",
    ):
        run_evaluate(base_dir, path, device="cpu")
    figures = run_evaluate(base_dir, path, device="cpu", on_empty="drop", on_too_long="drop")
    assert (figures["n_records"], figures["n_empty"], figures["n_too_long"]) == (1, 2, 2)
    alone = run_evaluate(base_dir, path, device="cpu", limit=1)
    assert figures == {**alone, "n_empty": 2, "n_too_long": 2}
    path.write_text(json.dumps(rows[1]))
    with pytest.raises(ValueError, match=r"none of the 1 records is left to score"):
        run_evaluate(base_dir, path, device="cpu", on_empty="drop")


def test_several_adapters_on_one_base(base_dir: Path, tmp_path: Path) -> None:
    """Law: each row of the comparison is the adapter's own evaluation, and the base's has none."""
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": r.prompt, "completion": r.completion}) for r in rows()))
    folders = {}
    for seed, name in enumerate("ab"):
        model, config = load_model(base_dir), LoraConfig(rank=2)
        attach_lora(model, config, seed=seed)
        for _, layer in lora_layers(model):
            layer.updates["default"].lora_b.data.normal_(generator=torch.Generator().manual_seed(seed))
        save_adapter(model, tmp_path / name, config, base=str(base_dir))
        folders[name] = tmp_path / name
    done: list[tuple[int, int]] = []
    found = compare(base_dir, path, folders, device="cpu", progress=lambda *n: done.append(n))
    assert list(found) == ["base", "a", "b"]
    assert done[-1] == (5, 5)
    for name, figures in found.items():
        assert figures == run_evaluate(base_dir, path, adapter=folders.get(name), device="cpu")
    assert len({figures["loss"] for figures in found.values()}) == 3
    with pytest.raises(ValueError, match="adapter name 'base' is the bare base's here"):
        compare(base_dir, path, {"base": tmp_path / "a"}, device="cpu")
