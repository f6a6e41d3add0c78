"""Fine-tuning, full, LoRA and QLoRA: what carries loss, learning, bit-identical resume, what is trained and what is not."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import graft
from graft.base.model.huggingface import fingerprint, save_model
from graft.base.runlog import read_metrics
from graft.base.tokenizer.tokenizer import Tokenizer
from graft.finetune import sft
from graft.finetune.adapters.bank import AdapterBank
from graft.finetune.adapters.lora import LoraConfig
from graft.finetune.data.chat import encode_record
from graft.finetune.data.packing import SFTBatches
from graft.finetune.data.records import read_records
from graft.finetune.evaluation.run import run_evaluate
from graft.finetune.generate import generate
from graft.finetune.loading import load_model
from graft.finetune.quantize import run_quantize
from graft.finetune.session import Session

METHODS = ("full", "lora", "qlora")
ANSWERS = {"the cat": "sleeps", "a bird": "sings", "the tree": "stands", "rivers": "run"}
LORA = LoraConfig(rank=4, alpha=8.0)
# PEFT 0.21 reads a name that transformers 5.23 calls deprecated: theirs to settle between them.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = [json.dumps({"prompt": f"{who}:", "completion": f" {does}"}) for who, does in ANSWERS.items()]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def loud_base(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base with ten times the embedding: else its tied head could give no token more than a few percent, however
    an adapter turned the hidden states (norm 8 times norm 0.16)."""
    folder = tmp_path_factory.mktemp("loud")
    model = load_model(base_dir, dtype=None)
    with torch.no_grad():
        model.model.embed_tokens.weight *= 10
    save_model(model, folder)
    Tokenizer.load(base_dir).save(folder)
    return folder


def train(base: Path, rows: Path, out: Path, method: str = "lora", *, resume: bool = False, **settings: Any) -> dict:
    return sft.run_sft(
        base=base,
        data=rows,
        out=out,
        method=method,
        lora=replace(LORA, dropout=settings.pop("dropout", 0.0)) if not resume else None,
        settings=settings if resume else {"batch_size": 4, "steps": 4} | settings,
        resume=resume,
        device="cpu",
        progress=False,
    )


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(folder / "metrics.jsonl")]


# --- what carries loss ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_only_the_answer_carries_loss(method: str, base_dir: Path, rows: Path, tmp_path: Path) -> None:
    """Worked out apart: the first logged loss is torch's cross entropy of each answer's tokens and its EOS, given the
    prompt, summed token by token on the untrained base, over their number."""
    train(base_dir, rows, tmp_path / "out", method, steps=1)
    model = load_model(base_dir, quantize="nf4" if method == "qlora" else None)
    tokenizer = Tokenizer.load(base_dir)
    total, count = 0.0, 0
    for who, does in ANSWERS.items():
        prompt = tokenizer.encode(f"{who}:").tolist()
        answer = [*tokenizer.encode(f" {does}").tolist(), tokenizer.eos_token_id]
        with torch.no_grad():
            log_p = model(torch.tensor([prompt + answer]))[0].log_softmax(-1)
        for i, token in enumerate(answer):
            total -= log_p[len(prompt) + i - 1, token].item()
            count += 1
    [line] = read_metrics(tmp_path / "out/metrics.jsonl")
    assert line["n_labels"] == count
    assert line["loss"] == pytest.approx(total / count, rel=1e-5)  # float32 sums in another order


def test_a_turn_carries_loss_up_to_its_end(base_dir: Path, tmp_path: Path) -> None:
    """Law: in a conversation the labels are the assistant's words and <|im_end|>, nothing of the user's."""
    row = {"messages": [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]}
    (tmp_path / "chat.jsonl").write_text(json.dumps(row))
    train(base_dir, tmp_path / "chat.jsonl", tmp_path / "out", steps=1, batch_size=1)
    tokenizer = Tokenizer.load(base_dir)
    [line] = read_metrics(tmp_path / "out/metrics.jsonl")
    assert line["n_labels"] == len(tokenizer.encode("sat")) + 1
    [record] = read_records(tmp_path / "chat.jsonl")
    encoded = encode_record(record, tokenizer, None, 97)
    assert encoded.ids[encoded.loss_mask][-1] == tokenizer.special_tokens["<|im_end|>"]
    about = json.loads((tmp_path / "out/graft.json").read_text())
    assert about["prompt_format"] == "chat"


def test_a_row_without_labels_is_an_error(base_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "the cat " * 60, "completion": "b"}]
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match=r"long\.jsonl line 2: no label is left after truncation to max_seq_len=97"):
        train(base_dir, path, tmp_path / "out")
    path.write_text(json.dumps({"prompt": "the cat", "completion": "b"}))
    with pytest.raises(ValueError, match=r"long\.jsonl line 1: no label is left after truncation to max_seq_len=2"):
        train(base_dir, path, tmp_path / "out", max_seq_len=2)


def test_packing_is_padding_without_the_padding(base_dir: Path, rows: Path, tmp_path: Path) -> None:
    """Law: records end to end in one row give the loss of one a row, with fewer positions read."""
    train(base_dir, rows, tmp_path / "padded", steps=2)
    train(base_dir, rows, tmp_path / "packed", steps=2, packing=True)
    one, other = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("padded", "packed"))
    assert one[0]["loss"] == pytest.approx(other[0]["loss"], rel=1e-5)  # float32 sums in another order
    assert one[0]["n_labels"] == other[0]["n_labels"]
    assert one[0]["n_tokens"] > other[0]["n_tokens"]
    assert one[1]["loss"] == pytest.approx(other[1]["loss"], rel=1e-3)  # after one AdamW step, whose size is the sign's


# --- learning and resuming -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_learns_four_answers(method: str, loud_base: Path, rows: Path, tmp_path: Path) -> None:
    """Learning: the four answers are learned by heart, to the EOS; the frozen base's file does not change."""
    before = (loud_base / "model.safetensors").read_bytes()
    rate = 3e-3 if method == "full" else 2e-2
    summary = train(loud_base, rows, tmp_path / "out", method, steps=70, learning_rate=rate, warmup_steps=5)
    curve = losses(tmp_path / "out")
    assert curve[0] > 4
    assert curve[-1] < 0.1
    assert summary["train_loss"] == curve[-1]
    assert (loud_base / "model.safetensors").read_bytes() == before
    if method == "full":
        model = load_model(tmp_path / "out")
    else:
        model = load_model(loud_base, quantize="nf4" if method == "qlora" else None)
        bank = AdapterBank(model)
        bank.load("it", tmp_path / "out")
        bank.use("it")
    written = generate(model, Tokenizer.load(loud_base), [f"{who}:" for who in ANSWERS], max_new_tokens=8)
    assert written == [f" {does}" for does in ANSWERS.values()]


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("full", {}),
        ("lora", {}),
        ("qlora", {}),
        ("lora", {"packing": True}),
        ("lora", {"dropout": 0.5}),  # the random state must come back too
        ("full", {"optimizer": "adamw8bit"}),
        ("full", {"optimizer": "muon"}),
        ("lora", {"dtype": "bfloat16", "batch_size": 3, "micro_batch": 1}),
    ],
    ids=str,
)
def test_resume_is_bit_identical(
    method: str, settings: dict[str, Any], base_dir: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law: dying in step 4 and going on from step 2's checkpoint gives the uninterrupted run's file and log."""
    settings = {"steps": 5, "checkpoint_every": 2} | settings
    train(base_dir, rows, tmp_path / "whole", method, **settings)
    batch_at = SFTBatches.batch_at

    def dies(self: SFTBatches, step: int) -> object:
        if step == 3:
            raise RuntimeError("the power fails")
        return batch_at(self, step)

    monkeypatch.setattr(SFTBatches, "batch_at", dies)
    with pytest.raises(RuntimeError, match="the power fails"):
        train(base_dir, rows, tmp_path / "cut", method, **settings)
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "cut/checkpoints").iterdir()] == ["step-00000002"]
    train(base_dir, rows, tmp_path / "cut", method, resume=True)
    name = "model.safetensors" if method == "full" else "adapter_model.safetensors"
    assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")
    assert len(losses(tmp_path / "cut")) == 5


# --- what is trained, what is left ---------------------------------------------------------------------------------


def test_lora_freezes_the_base(base_dir: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: after training every weight of the base in memory is bit for bit the file's; the optimizer holds A and B."""
    kept: list[Any] = []
    prepare = sft.prepare_model
    monkeypatch.setattr(sft, "prepare_model", lambda *given: kept.append(prepare(*given)) or kept[0])
    summary = train(base_dir, rows, tmp_path / "out", learning_rate=1e-2)
    stored = load_file(base_dir / "model.safetensors")
    found = {name.replace(".base.", "."): p for name, p in kept[0].named_parameters() if "lora_" not in name}
    assert set(stored) == set(found)
    for name, tensor in stored.items():
        assert torch.equal(found[name], tensor), name
        assert not found[name].requires_grad
    trained = {name: p for name, p in kept[0].named_parameters() if p.requires_grad}
    assert {name.rpartition(".")[2] for name in trained} == {"lora_a", "lora_b"}
    assert summary["n_trained_params"] == sum(p.numel() for p in trained.values())
    # by hand: two layers; q and o 64 x 64, k and v 32 x 64, gate, up and down 128 x 64, rank 4 on both sides
    assert summary["n_trained_params"] == 2 * 4 * (2 * (64 + 64) + 2 * (32 + 64) + 3 * (128 + 64))
    assert any(p.abs().max() > 0 for name, p in trained.items() if name.endswith("lora_b"))


def test_an_adapter_folder_opens_in_peft(base_dir: Path, rows: Path, tmp_path: Path) -> None:
    """Parity: what `graft sft --lora` leaves gives the same logits in transformers + PEFT."""
    train(base_dir, rows, tmp_path / "out", learning_rate=1e-2)
    model = load_model(base_dir)
    bank = AdapterBank(model)
    bank.load("it", tmp_path / "out")
    bank.use("it")
    assert bank.adapters["it"].graft["base_fingerprint"] == fingerprint(load_model(base_dir, dtype=None))
    theirs = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32), tmp_path / "out"
    ).eval()
    ids = torch.randint(0, 290, (2, 15), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, expected, alone = model(ids), theirs(ids).logits, load_model(base_dir)(ids)
    # float32 sums in another order: a few ulps of the largest logit
    torch.testing.assert_close(ours, expected, atol=2e-5 * expected.abs().max().item(), rtol=0)
    assert not torch.allclose(ours, alone, atol=1e-3)


def test_qlora_on_a_folder_in_four_bits(base_dir: Path, rows: Path, tmp_path: Path) -> None:
    """Law: training on a folder that `graft quantize` wrote is training on the base quantized as it loads; the adapter
    loads on both. Full fine-tuning refuses such a folder."""
    run_quantize(base_dir, tmp_path / "nf4")
    train(base_dir, rows, tmp_path / "a", "qlora")
    train(tmp_path / "nf4", rows, tmp_path / "b", "qlora")
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]
    for base in (base_dir, tmp_path / "nf4"):
        AdapterBank(load_model(base)).load("it", tmp_path / "b")
    with pytest.raises(ValueError, match=r"is in 4 bits and can't be fully fine-tuned; use --qlora"):
        train(tmp_path / "nf4", rows, tmp_path / "c", "full")
    assert not (tmp_path / "c/run.json").exists()
    with pytest.raises(
        ValueError, match=r"nf4 is in 4 bits already, and bitsandbytes' layers are made from a full-prec"
    ):
        train(tmp_path / "nf4", rows, tmp_path / "c", "qlora", quant_backend="bitsandbytes")
    with pytest.raises(ValueError, match=r"quant_backend=bitsandbytes is about QLoRA; add --qlora"):
        train(base_dir, rows, tmp_path / "c", "lora", quant_backend="bitsandbytes")
    with pytest.raises(ValueError, match=r"paged=true is about optimizer=adamw8bit"):
        train(base_dir, rows, tmp_path / "c", "lora", paged=True)
    train(base_dir, rows, tmp_path / "paged", "qlora", paged=True, optimizer="adamw8bit")
    train(base_dir, rows, tmp_path / "8 bits", "qlora", optimizer="adamw8bit")
    assert losses(tmp_path / "paged") == losses(tmp_path / "8 bits")


def test_a_base_in_four_bits_is_predicted_as_one(base_dir: Path, rows: Path, tmp_path: Path) -> None:
    """Law: LoRA on such a base takes what QLoRA takes, and its own choice of a second level counts, not the default's."""
    run_quantize(base_dir, tmp_path / "nf4")
    run_quantize(base_dir, tmp_path / "single", double_quant=False)
    runs = {
        "qlora": train(base_dir, rows, tmp_path / "a", "qlora"),
        "lora on nf4": train(tmp_path / "nf4", rows, tmp_path / "b", "lora"),
        "lora on single": train(tmp_path / "single", rows, tmp_path / "c", "lora"),
        "qlora, single": train(base_dir, rows, tmp_path / "d", "qlora", double_quant=False),
        "lora": train(base_dir, rows, tmp_path / "e", "lora"),
    }
    peaks = {name: summary["predicted_peak_bytes"] for name, summary in runs.items()}
    assert peaks["lora on nf4"] == peaks["qlora"] < peaks["lora"]
    assert peaks["lora on single"] == peaks["qlora, single"] != peaks["qlora"]


def test_a_full_run_leaves_a_base(base_dir: Path, rows: Path, tmp_path: Path) -> None:
    """Law: the folder is a base again, with tokenizer, prompt format, log, summary and the resolved config."""
    summary = train(base_dir, rows, tmp_path / "out", "full", epochs=2.0)
    assert summary["steps"] == 4
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("the cat")["input_ids"] == Tokenizer.load(base_dir).encode("the cat").tolist()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        expected = theirs(ids).logits
        torch.testing.assert_close(
            load_model(tmp_path / "out")(ids), expected, atol=2e-5 * expected.abs().max().item(), rtol=0
        )
    assert json.loads((tmp_path / "out/graft.json").read_text())["prompt_format"] == "text"
    config = json.loads((tmp_path / "out/run.json").read_text())["config"]
    assert (config["method"], config["lora"], config["train"]["learning_rate"]) == ("full", None, 5e-5)
    assert config["data"]["epochs"] == 2.0


def test_steps_follow_from_epochs() -> None:
    """Worked by hand: 3 epochs of 40 records, 16 an update: 3 updates an epoch, the last of 8 records; warm-up is a tenth, 0."""
    about = {"n_rows": 40}
    config = sft.resolve({}, method="lora", **about)
    assert config.train.weight_decay == 0.0
    assert (config.train.steps, config.train.warmup_steps, config.train.micro_batch) == (9, 0, 16)
    assert sft.resolve({"epochs": 10, "batch_size": 2}, method="full", **about).train.steps == 200
    assert sft.resolve({"epochs": 10, "batch_size": 2}, method="full", **about).train.warmup_steps == 20
    # 23 records, 16 an update, one epoch: a second update reads the last 7 (and begins the next pass)
    assert sft.resolve({"epochs": 1}, method="full", n_rows=23).train.steps == 2
    assert sft.resolve({"epochs": 0.1, "batch_size": 3}, method="full", n_rows=30).train.steps == 1
    with pytest.raises(ValueError, match="rank=4 is about an adapter; use method lora or qlora"):
        sft.resolve({"rank": 4}, method="full", **about)
    with pytest.raises(ValueError, match=r"epochs=0\.0 must be > 0"):
        sft.resolve({"epochs": 0}, method="full", **about)
    with pytest.raises(ValueError, match="unknown method 'dora'; choose full, lora, qlora"):
        sft.resolve({}, method="dora", **about)
    with pytest.raises(ValueError, match="unknown config key 'pack'"):
        sft.resolve({"pack": True}, method="lora", **about)


def test_cheap_arithmetic_trains_too(base_dir: Path, rows: Path, tmp_path: Path) -> None:
    """Law: in bfloat16 the first loss is float32's within bfloat16's precision, of which a sum over two layers keeps
    about two digits; held-out records give a validation loss."""
    train(base_dir, rows, tmp_path / "a", "full", dtype="float32")
    for method, optimizer in (("full", "adamw8bit"), ("lora", "adamw"), ("qlora", "adamw8bit")):
        out = tmp_path / f"{method}-{optimizer}"
        sft.run_sft(
            base=base_dir, data=rows, out=out, method=method, lora=LORA, eval_data=rows, device="cpu", progress=False,
            settings={"batch_size": 4, "steps": 3, "dtype": "bfloat16", "optimizer": optimizer},
        )  # fmt: skip
        assert losses(out)[0] == pytest.approx(losses(tmp_path / "a")[0], rel=2e-2)
        assert losses(out)[-1] < losses(out)[0]
        assert json.loads((out / "summary.json").read_text())["val_loss"] < losses(out)[0]


def test_resume_refuses_another_run(base_dir: Path, rows: Path, tmp_path: Path) -> None:
    train(base_dir, rows, tmp_path / "out", steps=2)
    with pytest.raises(ValueError, match=r"--resume goes on with batch_size=4, got 2; leave it out, or --force"):
        train(base_dir, rows, tmp_path / "out", resume=True, batch_size=2)
    with pytest.raises(FileExistsError, match="holds a sft lora run, this is sft qlora"):
        train(base_dir, rows, tmp_path / "out", "qlora", resume=True)
    with pytest.raises(ValueError, match=r"--resume goes on with rank=4"):
        sft.run_sft(
            base=base_dir, data=rows, out=tmp_path / "out", method="lora", lora=LoraConfig(rank=8, alpha=8.0),
            resume=True, device="cpu", progress=False,
        )  # fmt: skip


def test_resume_refuses_other_content(base_dir: Path, rows: Path, tmp_path: Path) -> None:
    """Law: records, held-out records, base and tokenizer may move, but not change, between a run and its resumption."""
    base, data, held_out = tmp_path / "base", tmp_path / "rows.jsonl", tmp_path / "held_out.jsonl"
    shutil.copytree(base_dir, base)
    shutil.copy(rows, data)
    shutil.copy(rows, held_out)

    def go(steps: int, **inputs: Path) -> dict[str, Any]:
        found = {"base": base, "data": data, "eval_data": held_out} | inputs
        return sft.run_sft(
            **found, out=tmp_path / "out", method="lora", lora=LORA, resume=steps > 2, device="cpu", progress=False,
            settings={"steps": steps},
        )  # fmt: skip

    go(2)
    moved = tmp_path / "moved.jsonl"
    shutil.copy(rows, moved)
    assert go(3, data=moved)["steps"] == 3
    for path, name in ((data, "data"), (held_out, "eval_data"), (base / "tokenizer.json", "tokenizer")):
        whole = path.read_text()
        path.write_text(whole + "\n")
        with pytest.raises(ValueError, match=rf"--resume: {name} .* is not what the run was started with"):
            go(4)
        path.write_text(whole)
    weights = base / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"--resume: base .* is not what the run was started with"):
        go(4)
    weights.write_bytes(whole)
    assert go(4)["steps"] == 4


def test_sft_from_python(base_dir: Path, rows: Path, tmp_path: Path) -> None:
    """Law: keyword arguments are the command's keys, LoRA's too; the figures are a dict."""
    figures = graft.sft(
        base=base_dir, data=rows, out=tmp_path / "out", method="lora", device="cpu", rank=2, alpha=4, steps=2,
        targets=["q_proj"], schedule="linear",
    )  # fmt: skip
    assert (figures["steps"], figures["method"]) == (2, "lora")
    config = json.loads((tmp_path / "out/run.json").read_text())["config"]
    assert config["lora"] == {**config["lora"], "rank": 2, "alpha": 4.0, "targets": ["q_proj"]}
    assert config["train"]["schedule"] == "linear"
    with pytest.raises(ValueError, match=r"unknown config key 'lora_r'; did you mean rank\?"):
        graft.sft(base=base_dir, data=rows, out=tmp_path / "x", method="lora", lora_r=2)
    assert not (tmp_path / "x").exists()


def test_the_best_steps_weights_are_kept(base_dir: Path, rows: Path, tmp_path: Path) -> None:
    """Law: with keep=best the adapter on disk is the one of the lowest validation loss: the held-out answer is one that the
    rows contradict, so that its loss falls (it is a short word too) and rises again."""
    (tmp_path / "held_out.jsonl").write_text(json.dumps({"prompt": "the cat:", "completion": " sings"}))
    common: dict[str, Any] = {
        "base": base_dir, "data": rows, "eval_data": tmp_path / "held_out.jsonl", "method": "lora", "device": "cpu",
        "rank": 4, "batch_size": 4, "learning_rate": 0.05, "schedule": "constant", "warmup_steps": 0,
    }  # fmt: skip
    figures = graft.sft(**common, out=tmp_path / "long", steps=60, eval_every=1, keep="best,last", patience=3)
    best = figures["best_step"]
    assert best < figures["steps"] < 60
    graft.sft(**common, out=tmp_path / "short", steps=best, eval_every=1)
    one, other = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("long", "short"))
    assert all(torch.equal(one[name], other[name]) for name in one)


# --- data, templates, going on -------------------------------------------------------------------------------------


def go(base: Path, data: Any, out: Path, **options: Any) -> dict[str, Any]:
    common: dict[str, Any] = {"method": "lora", "device": "cpu", "rank": 2, "alpha": 4.0, "batch_size": 4, "epochs": 1}
    return graft.sft(base=base, data=data, out=out, **common | options)


def test_every_file_of_data_is_read(base_dir: Path, tmp_path: Path) -> None:
    """Law: two files, a folder and a glob are all read, once; weights repeat the smaller file; a change in any of them is
    another run."""
    for name, n in (("a", 3), ("b", 2)):
        rows = [json.dumps({"prompt": f"{name} {i}", "completion": " x"}) for i in range(n)]
        (tmp_path / "rows" / f"{name}.jsonl").parent.mkdir(exist_ok=True)
        (tmp_path / "rows" / f"{name}.jsonl").write_text("\n".join(rows))
    a, b = tmp_path / "rows/a.jsonl", tmp_path / "rows/b.jsonl"
    both = go(base_dir, [a, b], tmp_path / "both")
    assert (both["n_records"], both["n_rows"], both["steps"]) == (5, 5, 2)
    assert go(base_dir, tmp_path / "rows", tmp_path / "folder")["n_records"] == 5
    assert go(base_dir, str(tmp_path / "rows/*.jsonl"), tmp_path / "glob")["n_records"] == 5
    weighted = go(base_dir, [f"{a}=0.5", f"{b}=0.5"], tmp_path / "weighted")
    assert weighted["n_records"] == 6  # three of each
    inputs = [
        json.loads((tmp_path / name / "run.json").read_text())["config"]["inputs"] for name in ("both", "weighted")
    ]
    assert inputs[0]["data"]["path"] == f"{a}, {b}"
    assert inputs[0]["data"]["sha256"] != inputs[1]["data"]["sha256"]
    for changed in ([a], [b, a], [f"{a}=1", f"{b}=1"]):
        with pytest.raises(ValueError, match=r"--resume: data .* is not what the run was started with"):
            go(base_dir, changed, tmp_path / "both", resume=True, epochs=2)
    b.write_text(b.read_text().replace("b 1", "b 9"))
    with pytest.raises(ValueError, match=r"--resume: data .* is not what the run was started with"):
        go(base_dir, [a, b], tmp_path / "both", resume=True)


def test_what_becomes_of_bad_rows(base_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Law: empty and too long rows are all named in one message, or dropped, counted in the summary and said."""
    rows = [
        {"prompt": "a", "completion": " b"},
        {"prompt": "c", "completion": None},
        {"prompt": "the cat " * 60, "completion": " b"},
        {"prompt": "d", "completion": ""},
        {"prompt": "e", "completion": " the cat sat" * 40},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(
        ValueError, match=r"3 rows can't be used: .*line 2: completion is null.*line 3: no label.*line 4: comp"
    ):
        go(base_dir, path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    path.write_text("\n".join(json.dumps(row) for row in rows if row is not rows[2]))
    figures = go(base_dir, path, tmp_path / "cut", on_empty="drop")
    assert (figures["n_records"], figures["n_empty"], figures["n_cut"], figures["n_rows"]) == (4, 2, 1, 2)
    assert figures["n_lost_labels"] > 0
    said = capsys.readouterr().err
    assert "2 of 4 records are null or empty and were dropped" in said
    assert "1 of 4 records are longer than 97 tokens and were cut" in said
    path.write_text("\n".join(map(json.dumps, rows)))
    figures = go(base_dir, path, tmp_path / "dropped", on_empty="drop", on_too_long="drop", eval_data=path)
    assert (figures["n_dropped"], figures["n_empty"], figures["n_rows"]) == (2, 2, 1)
    assert (figures["eval_n_dropped"], figures["eval_n_in_training"]) == (2, 3)  # the empty ones say nothing
    assert "eval data: 2 of 5 records are longer" in capsys.readouterr().err
    with pytest.raises(ValueError, match="--on-empty 'skip' is unknown; choose drop, error"):
        go(base_dir, path, tmp_path / "x", on_empty="skip")


def test_fields_template_and_its_arguments(base_dir: Path, tmp_path: Path) -> None:
    """Law: other field names are read; the named template and its arguments are trained on, and stay with the adapter."""
    path, template = tmp_path / "rows.jsonl", tmp_path / "own.jinja"
    path.write_text(json.dumps({"question": "the cat", "answer": " sat"}))
    assert go(base_dir, path, tmp_path / "a", fields={"prompt": "question", "completion": "answer"})["n_rows"] == 1
    with pytest.raises(ValueError, match=r"no field 'ask' for prompt; the row has answer, question"):
        go(base_dir, path, tmp_path / "x", fields={"prompt": "ask"})
    template.write_text(
        "{% for m in messages %}{{ mark }}{{ m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ mark }}{% endif %}"
    )
    turns = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat"}]
    path.write_text(json.dumps({"messages": turns}))
    options: dict[str, Any] = {"chat_template": str(template), "template_args": {"mark": "zz"}}
    figures = go(base_dir, path, tmp_path / "out", **options)
    tokenizer = Tokenizer.load(base_dir)
    expected = len(tokenizer.encode("zzthe catzz")) + len(tokenizer.encode("sat")) + 1
    assert figures["n_tokens"] == expected
    assert json.loads((tmp_path / "out/graft.json").read_text())["template_args"] == {"mark": "zz"}
    assert (tmp_path / "out/chat_template.jinja").read_text() == template.read_text()
    speaker = Session(base_dir, dtype="float32", device="cpu", chat=None)
    speaker.load("it", tmp_path / "out")
    assert tokenizer.decode(speaker.prompt_ids(turns[:1])) == "zzthe catzz"
    # going on from it keeps both
    more = go(base_dir, path, tmp_path / "more", adapter=tmp_path / "out")
    assert more["n_tokens"] == expected
    assert json.loads((tmp_path / "more/graft.json").read_text())["template_args"] == {"mark": "zz"}


def test_going_on_from_an_adapter(base_dir: Path, rows: Path, tmp_path: Path) -> None:
    """Law: the first loss is that of the adapter as it was, its shape stays, the folder is untouched; other ranks, other
    bases and other content on resume are refused."""
    go(base_dir, rows, tmp_path / "one", learning_rate=0.02, steps=6, targets=["q_proj", "down_proj"])
    before = (tmp_path / "one/adapter_model.safetensors").read_bytes()
    [loss] = [run_evaluate(base_dir, rows, adapter=tmp_path / "one", device="cpu")["loss"]]
    common = {"method": "lora", "device": "cpu", "batch_size": 4, "adapter": tmp_path / "one"}
    graft.sft(base=base_dir, data=rows, out=tmp_path / "two", steps=3, checkpoint_every=1, **common)
    assert losses(tmp_path / "two")[0] == pytest.approx(loss, rel=1e-5)  # float32 sums in another order
    assert (tmp_path / "one/adapter_model.safetensors").read_bytes() == before
    config = json.loads((tmp_path / "two/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], sorted(config["target_modules"])) == (2, 4, ["down_proj", "q_proj"])
    with pytest.raises(ValueError, match=r"rank=8 can't change while going on from .*one, which has 2"):
        graft.sft(base=base_dir, data=rows, out=tmp_path / "x", rank=8, **common)
    with pytest.raises(ValueError, match=r"can be trained further with method lora or qlora, got full"):
        graft.sft(base=base_dir, data=rows, out=tmp_path / "x", **common | {"method": "full"})
    with pytest.raises(ValueError, match=r"--out .*one is the adapter itself"):
        graft.sft(base=base_dir, data=rows, out=tmp_path / "one", **common)
    (tmp_path / "one/adapter_config.json").write_text((tmp_path / "one/adapter_config.json").read_text() + " ")
    with pytest.raises(ValueError, match=r"--resume: adapter .* is not what the run was started with"):
        graft.sft(base=base_dir, data=rows, out=tmp_path / "two", steps=4, resume=True, **common)
