"""`graft pretrain` on mixtures and whole documents: resumed it is the same run, and what it read is told."""

import json
import math
from pathlib import Path

import pytest

from graft.base.checkpoint import load_tensors
from graft.base.data.shards import open_tokens, prepare
from graft.base.data.training_text import WindowOptions
from graft.base.pretrain import run_pretrain
from graft.base.tokenizer.tokenizer import Tokenizer

TINY = {
    **{"d_model": 16, "n_layers": 1, "n_heads": 2, "max_seq_len": 16, "steps": 8, "batch_size": 4, "micro_batch": 2},
    **{"eval_every": 4, "eval_batches": 1, "checkpoint_every": 3, "warmup_steps": 0},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token shards a and b; b's validation is among a's training documents."""
    there = tmp_path_factory.mktemp("text")
    documents = [f"the cat number {i} sat on the mat, and the other cat sat there too" for i in range(90)]
    for name, rows in (("a", documents), ("b", documents[60:70] * 3), ("held", [*documents[:1], "a dog"])):
        (there / f"{name}.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    tokenizer = Tokenizer.train([there / "a.jsonl"], vocab_size=270)
    tokenizer.save(there / "tokenizer")
    prepare([there / "a.jsonl"], tokenizer, there / "a", val_fraction=0.1)
    prepare([there / "b.jsonl"], tokenizer, there / "b", val_paths=[there / "held.jsonl"])
    return there


@pytest.mark.parametrize("windows", ["aligned", "best_fit"])
def test_a_mixture_resumed_is_the_same_run(
    folder: Path, tmp_path: Path, windows: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Law: stopped and resumed, the weights are bit for bit those of the run that went through; the summary counts epochs."""
    given = {"tokenizer": folder / "tokenizer", "device": "cpu"}
    data = [f"{folder / 'a'}=0.9,0.2@0.5", f"{folder / 'b'}=0.1,0.8@0.5"]
    settings = TINY | {"windows": windows, "document_mask": True}
    whole = run_pretrain(**given, data=data, out=tmp_path / "whole", settings=settings)
    said = capsys.readouterr().err

    from graft.base import pretrain

    train = pretrain.train

    def stopped(*rest: object, **options: object) -> object:
        def stop(line: dict[str, float]) -> None:
            if line["step"] == 5:
                raise KeyboardInterrupt

        return train(*rest, **options | {"on_step": stop})  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "train", stopped)
        with pytest.raises(KeyboardInterrupt):
            run_pretrain(**given, data=data, out=tmp_path / "parts", settings=settings, progress=False)
    resumed = run_pretrain(**given, data=data, out=tmp_path / "parts", resume=True, progress=False)
    weights = [load_tensors(tmp_path / name / "model.safetensors") for name in ("whole", "parts")]
    assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])
    measured = {"seconds", "tokens_per_s", "peak_bytes", "host_peak_bytes"}
    for name in whole.keys() - measured:
        assert name.endswith("_s") or "peak" in name or whole[name] == resumed[name], name
    for name in ("a", "b"):
        assert whole[f"epochs_{name}"] > 0
        assert f"val_{name}_bits_per_byte" in whole
    val = {name: open_tokens(folder / name, "val") for name in ("a", "b")}
    n = {name: len(tokens) for name, tokens in val.items()}
    assert n["a"] != n["b"]
    expected = sum(whole[f"val_{name}_loss"] * n[name] for name in n) / sum(n.values())
    assert whole["val_loss"] == pytest.approx(expected)
    assert whole["val_bits_per_byte"] == pytest.approx(
        expected / math.log(2) * sum(n.values()) / sum(tokens.n_bytes for tokens in val.values())
    )
    assert (whole["left_out_share_a"] > 0) == (windows == "aligned")
    assert (whole["padding_share_a"] > 0) == (windows == "best_fit")
    assert "epochs; " in said
    assert "1 of the 2 documents" in said
    with pytest.raises(ValueError, match=r"--resume: data .* is not what the run was started with"):
        run_pretrain(
            **given, data=[data[0], f"{folder / 'b'}=0.5"], out=tmp_path / "parts", resume=True, progress=False
        )
    with pytest.raises(ValueError, match="--resume goes on with windows='"):
        run_pretrain(**given, data=data, out=tmp_path / "parts", settings={"windows": "stream"}, resume=True)


def test_many_epochs_are_warned_of(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = {"tokenizer": folder / "tokenizer", "device": "cpu", "data": folder / "b"}
    settings = TINY | {"max_seq_len": 64, "steps": 22}
    summary = run_pretrain(**given, out=tmp_path / "out", settings=settings)
    assert summary["epochs"] > 4
    assert f"is read {summary['epochs']:.1f} times; beyond about 4 times" in capsys.readouterr().err
    few = run_pretrain(**given, out=tmp_path / "few", settings=settings | {"steps": 2})
    assert few["epochs"] < 4
    assert "beyond about 4" not in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"one batch of batch_size=400 takes 400 of them: add text"):
        run_pretrain(**given, out=tmp_path / "x", settings=settings | {"batch_size": 400})


def test_unknown_choices() -> None:
    with pytest.raises(ValueError, match="unknown windows 'bestfit'; choose stream, aligned, best_fit"):
        WindowOptions(windows="bestfit")
