"""A rank's memory and the search of layouts: laws on small models, and the command."""

import json
import sys
from dataclasses import replace

import pytest

from graft import cli
from graft.base.cluster.layout import Layout
from graft.base.model.config import ModelConfig
from graft.base.plan import DEVICES, Device
from graft.finetune.memory import layout_search
from graft.finetune.memory.layout_search import default_batch, find_layouts
from graft.finetune.memory.predict import estimate_memory
from graft.finetune.memory.rank_share import in_flight, rank_memory, share
from graft.finetune.memory.units import parse_seconds, say_seconds

CONFIG = ModelConfig(512, 64, 4, 4, 2, 16, 256, 256, qk_norm=False)
N = CONFIG.n_params


def memory(layout: Layout, n_micro: int = 1) -> int:
    return rank_memory(CONFIG, layout, n_micro=n_micro, seq_len=64)


@pytest.mark.parametrize("recompute", [False, True])
def test_one_rank_needs_what_a_step_needs(recompute: bool) -> None:
    """Law: without a mesh it is graft's own prediction, which the measurements hold (test_predict.py)."""
    alone = estimate_memory(CONFIG, batch_size=2, seq_len=64, checkpointing=recompute, device="cuda")
    assert memory(Layout(micro_batch=2, recompute=recompute)) == alone.peak_bytes


def test_zero_divides_the_state() -> None:
    """By hand: of N parameters stage 1 saves 3/4 of AdamW's 8 bytes on 4 ranks (rounded up to 512 bytes a tensor), 2 and 3 save
    more, and dp and cp count as copies alike."""
    at = [memory(Layout(dp=4, zero=stage, recompute=True)) for stage in range(4)]
    assert at[0] == memory(Layout(recompute=True))
    assert at[0] - at[1] == pytest.approx(8 * N * 3 / 4, rel=0.02)
    assert 0 < at[1] - at[2] <= 4 * N * 3 / 4 * 1.02
    assert at[2] > at[3]
    assert memory(Layout(dp=2, cp=2, zero=1, recompute=True)) < at[1]  # half of each sequence


def test_a_pipelines_first_stage_keeps_as_many_micro_batches_as_stages() -> None:
    """By hand: 4 stages keep 4 micro-batches, 2 when there are but 2, and 1.75 times as many with interleaved parts... of a stage
    each: (1 + 3/8) x 4 = 5.5."""
    assert in_flight(Layout(pp=4), 16) == 4
    assert in_flight(Layout(pp=4), 2) == 2
    assert in_flight(Layout(pp=4, chunks=2), 16) == 5.5
    assert in_flight(Layout(), 16) == 1
    kept = estimate_memory(
        share(CONFIG, Layout(pp=2)), batch_size=2, micro_batch=1, seq_len=64, checkpointing=False, device="cuda"
    )
    assert memory(Layout(pp=2), n_micro=8) == kept.peak_bytes + sum(kept.activations)


def test_a_ranks_share() -> None:
    """By hand: of 4 heads 2, of 2 kv heads 1, of 256 columns 128, of 4 layers 2; one embedding, experts by ep."""
    mixture = replace(CONFIG, n_experts=8, d_expert=32, tie_embeddings=False, expert_layers=(False, True, True, True))
    own = share(mixture, Layout(tp=2, pp=2, ep=4))
    assert (own.n_heads, own.n_kv_heads, own.d_ff, own.n_layers, own.vocab_size) == (2, 1, 128, 2, 256)
    assert (own.n_experts, own.d_expert, own.tie_embeddings, own.expert_layers) == (2, 16, True, (False, True))


def find(n_gpus: int = 8, **changes: object) -> list[layout_search.FoundLayout]:
    options = {"n_gpus": n_gpus, "n_tokens": 1e9, "batch": 16, "seq_len": 64, "device": "h100"}
    return find_layouts(CONFIG, **(options | changes))


def test_the_search_gives_the_fastest_that_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Laws: the fastest first, one a mesh, all within the memory; less memory leaves others, and none is said with the least."""
    found = find()
    times = [one.time.total for one in found]
    assert times == sorted(times)
    assert len({one.layout.mesh for one in found}) == len(found) <= 10
    one = found[0]
    assert one.tokens_per_s == pytest.approx(16 * 64 / one.time.total)
    assert one.seconds == pytest.approx(1e9 / one.tokens_per_s)
    assert 0 < one.mfu < 1
    small = max(one.memory_bytes for one in found) / layout_search.USABLE - 1
    monkeypatch.setitem(DEVICES, "h100", replace(DEVICES["h100"], memory_bytes=small))
    fewer = find()
    assert all(one.memory_bytes <= small * layout_search.USABLE for one in fewer)
    assert [one.layout for one in fewer] != [one.layout for one in found]
    monkeypatch.setitem(DEVICES, "h100", Device("H100 SXM", 1e15, 1e12, 1e4))
    with pytest.raises(
        ValueError, match=r"nothing fits into 8.98 KiB of each H100 SXM: the layout that needs least takes"
    ):
        find()
    with pytest.raises(ValueError, match="no mesh of 7 GPUs divides 4 heads, 2 kv heads, 4 layers and a batch of 16"):
        find(7)
    with pytest.raises(ValueError, match="unknown device 'abacus'"):
        find(device="abacus")


def test_what_binds() -> None:
    """By hand: the largest of messages, bubble and recomputation, if it is a tenth of the step."""
    time = layout_search.StepTime(7.0, 1.0, 0, 0, 0, 1.6, 0.5, 0)  # 1.5 s of messages, 1.6 s idle
    assert layout_search._bound(time, 0) == "bubble"
    assert layout_search._bound(replace(time, data=1.0), 0) == "network"
    assert layout_search._bound(time, 3.0) == "memory"
    assert layout_search._bound(replace(time, bubble=0.3, tensor=0.2), 0.1) == "compute"


def test_times_and_batches() -> None:
    assert [parse_seconds(text) for text in ("20min", "2 h", "1.5d", "30s")] == [1200, 7200, 129_600, 30]
    for wrong in ("20", "min", "0s", "soon", "-1h"):
        with pytest.raises(ValueError, match="is no time; write a number and one of"):
            parse_seconds(wrong)
    assert [say_seconds(s) for s in (5, 1200, 7200, 400_000)] == ["5.00 s", "20.0 min", "2.0 hours", "4.6 days"]
    assert default_batch(1024, 8192) == 512  # no more than about 4M tokens: a power of two
    assert default_batch(96, 4096) % 96 == 0


def run(*arguments: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    monkeypatch.setattr(sys, "argv", ["graft", "plan", *arguments])
    with pytest.raises(SystemExit):
        cli.main()
    return capsys.readouterr()


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Laws: JSON holds the layouts; a budget's tokens are what the fastest reads in it; contradictions are one line."""
    both = {"monkeypatch": monkeypatch, "capsys": capsys}
    base = ("--model", "nano", "--gpus", "8", "--batch", "16", "--gpu", "a100", "--json")
    found = json.loads(run(*base, "--budget", "2h", **both)[0])
    assert found["n_tokens"] == pytest.approx(7200 * found["layouts"][0]["tokens_per_s"])
    assert {"mesh", "bound_by", "memory_bytes", "time", "mfu"} <= found["layouts"][0].keys()
    assert "the fastest: --set mesh=" in run(*base[:-1], **both)[0]
    for wrong, message in (
        (("--budget", "1h", "--tokens", "1e9"), "--budget 1h and --tokens 1e9 contradict each other"),
        (("--model", "nano", "--batch", "4"), "--batch 4 goes with --gpus"),
        (
            ("--model", "nano", "--budget", "1h"),
            "--budget without --gpus is about this machine's own recipe; leave out --model",
        ),
        ((), "--model is missing"),
    ):
        assert message in run(*wrong, **both)[1]
