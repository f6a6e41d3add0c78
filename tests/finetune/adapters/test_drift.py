"""No lie in an export: what is compared is what was written, on held-out text or records, in bounded memory."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import graft
from graft.base.model.huggingface import fingerprint, save_model
from graft.base.tokenizer.tokenizer import Tokenizer
from graft.finetune.adapters import combine, drift, extract, merge
from graft.finetune.adapters.drift import drift_from, drift_of, held_out_rows
from graft.finetune.adapters.files import read_adapter, save_adapter
from graft.finetune.adapters.lora import LoraConfig, attach_lora, lora_layers
from graft.finetune.loading import load_model, save_any


@pytest.fixture(scope="module")
def adapter(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that moves predictions."""
    folder = tmp_path_factory.mktemp("adapter") / "one"
    model, config = load_model(base_dir), LoraConfig(rank=4, alpha=8.0)
    attach_lora(model, config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, layer in lora_layers(model):
            layer.updates["default"].lora_b.normal_(0, 0.5, generator=generator)
    save_adapter(
        model,
        folder,
        config,
        base=str(base_dir),
        graft={"base_fingerprint": fingerprint(model), "prompt_format": "text"},
    )
    return folder


def test_what_is_compared_is_what_was_written(
    base_dir: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law: a writer that loses the update is refused by each export, and leaves no folder; that is what reading back is for."""
    save_model(load_model(base_dir), tmp_path / "plain")

    def lost(model: Any, folder: Path, *, stored: Any) -> None:
        save_any(load_model(base_dir), folder, stored=None)

    def zeros(model: Any, folder: Path, config: Any, **options: Any) -> None:
        for _, layer in lora_layers(model):
            for update in layer.updates.values():
                update.lora_b.data.zero_()
        save_adapter(model, folder, config, **options)

    for module in (merge, combine, extract):
        monkeypatch.setattr(module, "LARGEST_KL", 1e-6)
    monkeypatch.setattr(merge, "save_any", lost)
    monkeypatch.setattr(combine, "save_adapter", zeros)
    merge.run_merge(base_dir, adapter, tmp_path / "told", allow_drift=True)
    report = json.loads((tmp_path / "told/merge.json").read_text())
    assert report["kl"] > 1e-4
    exports = {
        "the merged model's predictions": lambda: merge.run_merge(base_dir, adapter, tmp_path / "out"),
        "the combined adapter's predictions": lambda: graft.merge(base=base_dir, adapters=[adapter], out=tmp_path / "out"),
        r"base \+ adapter predict otherwise": lambda: extract.run_extract(
            base=base_dir, tuned=tmp_path / "told2", out=tmp_path / "out", rank=4
        ),
    }  # fmt: skip
    monkeypatch.undo()
    merge.run_merge(base_dir, adapter, tmp_path / "told2")
    for module in (merge, combine, extract):
        monkeypatch.setattr(module, "LARGEST_KL", 1e-6)
    monkeypatch.setattr(merge, "save_any", lost)
    monkeypatch.setattr(combine, "save_adapter", zeros)
    for message, export in exports.items():
        with pytest.raises(ValueError, match=message):
            export()
        assert not (tmp_path / "out").exists()


def test_sixteen_bits_and_four(base_dir: Path, adapter: Path, tmp_path: Path) -> None:
    """Law: merged in 16 bits predictions are the unmerged ones to that format's rounding; in 4 bits the loss is measured."""
    save_model(load_model(base_dir), tmp_path / "half", dtype="bfloat16")
    Tokenizer.load(base_dir).save(tmp_path / "half")
    graft.quantize(base=base_dir, out=tmp_path / "nf4")
    found = {}
    for name, base in (("float32", base_dir), ("bfloat16", tmp_path / "half"), ("nf4", tmp_path / "nf4")):
        report = graft.merge(base=base, adapters=[adapter], out=tmp_path / "out" / name, into="base", allow_drift=True)
        assert report == json.loads((tmp_path / "out" / name / "merge.json").read_text())
        found[name] = report["kl"]
    assert found["float32"] < 1e-9
    assert found["bfloat16"] < 1e-4
    assert found["bfloat16"] < found["nf4"]
    assert load_model(tmp_path / "out/bfloat16", dtype=None).model.norm.weight.dtype == torch.bfloat16


def test_on_text_and_on_records(base_dir: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: a text is read in rows, records as they train, both as far as the budget of bytes goes."""
    tokenizer, config = Tokenizer.load(base_dir), load_model(base_dir).config
    (tmp_path / "text.txt").write_text("the cat sat on the mat and looked at the bird " * 40)
    (tmp_path / "rows.jsonl").write_text(
        "\n".join(json.dumps({"prompt": "the cat", "completion": " sat"}) for _ in range(3))
    )
    one = read_adapter(adapter)
    rows = held_out_rows(tokenizer, config, tmp_path / "text.txt", one)
    assert all(len(row) <= config.max_seq_len for row in rows)
    assert torch.cat(rows).tolist() == tokenizer.encode((tmp_path / "text.txt").read_text()).tolist()
    records = held_out_rows(tokenizer, config, tmp_path / "rows.jsonl", one)
    assert len(records) == 3
    assert tokenizer.decode(records[0].tolist()).startswith("the cat sat")
    monkeypatch.setattr(drift, "ROW", 50)
    monkeypatch.setattr(drift, "MOST_BYTES", 4 * config.vocab_size * 120)
    assert [len(row) for row in held_out_rows(tokenizer, config, tmp_path / "text.txt", one)] == [50, 50, 20]
    for name, data, message in (("empty.txt", b"", "holds no text"), ("odd.txt", b"a\xff", "not UTF-8 at byte 1")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=message):
            held_out_rows(tokenizer, config, tmp_path / name, one)


def test_rows_count_by_their_tokens(base_dir: Path) -> None:
    """Law: a row at a time gives what all rows at once give."""
    model, rows = load_model(base_dir), [torch.arange(3), torch.arange(30)]
    written = drift.next_token_logp(model, rows)
    meant = [
        (p + torch.randn(p.shape, generator=torch.Generator().manual_seed(len(p)))).log_softmax(-1) for p in written
    ]
    whole, parts = drift_of(written, meant), drift_from(meant, model, rows)
    assert parts.n_tokens == whole.n_tokens == 33
    assert parts.kl == pytest.approx(whole.kl, rel=1e-6)
    assert parts.equal_tokens == pytest.approx(whole.equal_tokens)
