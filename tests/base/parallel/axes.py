"""What each of four ranks runs in test_axes.py."""

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from graft.base.model.config import ModelConfig
from graft.base.model.presets import preset
from graft.base.model.sizes import with_sizes
from graft.base.model.transformer import Transformer, initialize_
from graft.base.parallel.context import Ring, ring_bytes
from graft.base.parallel.experts import Owners, expert_bytes
from graft.base.parallel.pipeline import Pipeline, keep_stages, pipeline_bytes
from graft.base.parallel.reference.ring_attention import ring_attention
from graft.kernels.attention import attention

from .traffic import Traffic

T, V = 16, 64


def config(**sizes: Any) -> ModelConfig:
    small = {"d_model": 16, "n_heads": 2, "n_kv_heads": 1, "max_seq_len": T, **sizes}
    return with_sizes(replace(preset("nano"), vocab_size=V), **small)


def made(c: ModelConfig) -> Transformer:
    model = Transformer(c)
    initialize_(model, seed=1)
    return model.train()


def rows(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """ids and targets (n, T); some carry no loss."""
    ids = torch.randint(0, V, (n, T), generator=torch.Generator().manual_seed(seed))
    targets = ids.roll(-1, 1)
    targets[:, -1] = -100
    targets[0, : T // 2] = -100
    return ids, targets


def gap(a: Tensor | None, b: Tensor | None) -> float:
    assert a is not None
    assert b is not None
    return float((a - b).detach().abs().max())


# --- context -------------------------------------------------------------------------------------------------------


def ring_against_one_rank(
    group: dist.ProcessGroup, *, balanced: bool, window: int | None, packed: bool, **scores: float
) -> list[float]:
    generator = torch.Generator().manual_seed(3)
    length = 24
    q, k, v, d_out = (torch.randn(1 if packed else 2, heads, length, 8, generator=generator) for heads in (4, 2, 2, 4))
    cu_seqlens = torch.tensor([0, 3, 3, 14, length - 3], dtype=torch.int32) if packed else None
    whole = [x.requires_grad_() for x in (q, k, v)]
    out = attention(*whole, window=window, cu_seqlens=cu_seqlens, **scores)
    out.backward(d_out)
    ring = Ring(group, balanced)
    own = [ring.own(x, 2).detach().requires_grad_() for x in whole]
    part = ring.attend(*own, window=window, cu_seqlens=cu_seqlens, **scores)
    part.backward(ring.own(d_out, 2))
    return [gap(ring.own(out, 2), part)] + [gap(ring.own(a.grad, 2), b.grad) for a, b in zip(whole, own, strict=True)]


def rings(group: dist.ProcessGroup) -> dict[str, list[float]]:
    cases = [(b, w, p) for b in (False, True) for w in (None, 1, 5, 20) for p in (False, True)]
    found = {
        str(case): ring_against_one_rank(group, balanced=case[0], window=case[1], packed=case[2]) for case in cases
    }
    capped = ring_against_one_rank(group, balanced=True, window=5, packed=True, scale=2.0, softcap=1.5)
    return found | {"capped": capped}


def ring_in_half_precision(group: dist.ProcessGroup) -> dict[str, float]:
    """Errors against float32 of the ring's and of plain attention's output and gradients, under autocast."""
    generator = torch.Generator().manual_seed(3)
    tensors = [torch.randn(1, 2, 16, 16, generator=generator).requires_grad_() for _ in range(3)]
    d_out = torch.randn(1, 2, 16, 16, generator=generator)
    ring = Ring(group, balanced=True)

    def results(attend: Any, own: Any, *, half: bool) -> list[Tensor]:
        mine = [own(x).detach().requires_grad_() for x in tensors]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            out = attend(*mine)
        assert out.dtype == (torch.bfloat16 if half else torch.float32)
        out.backward(own(d_out).to(out.dtype))
        return [out.detach().float(), *(x.grad for x in mine)]

    truth = [ring.own(x, 2) for x in results(attention, lambda x: x, half=False)]
    plain = [ring.own(x, 2) for x in results(attention, lambda x: x, half=True)]
    ours = results(ring.attend, lambda x: ring.own(x, 2), half=True)
    return {
        "plain": max(gap(a, b) for a, b in zip(truth, plain, strict=True)),
        "ring": max(gap(a, b) for a, b in zip(truth, ours, strict=True)),
    }


def model_on_a_ring(group: dist.ProcessGroup, *, recomputed: bool) -> dict[str, Any]:
    """Loss and gradients of rows whose positions are spread, and the bytes for them."""
    c = config(n_layers=2, sliding_window=5, sliding_layers=[True, False])
    whole, model = made(c), made(c)
    ids, targets = rows(3)
    loss = whole(ids, targets)
    loss.backward()
    ring = Ring(group, balanced=T % (2 * group.size()) == 0)
    model.shared_rows, model.checkpointing = ring, recomputed
    n = group.size()
    with Traffic(group.rank(), n) as traffic:
        part = model(ring.own(ids), ring.own(targets))
        part.backward()
    total = part.detach()
    dist.all_reduce(total, group=group)
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad, group=group)
    a_layer = ring_bytes(n=n, T=T // n, rows=3, n_kv_heads=1, d_head=c.d_head, recomputed=recomputed)
    return {
        "loss": gap(total, loss) / float(loss.detach()),
        "gradients": max(gap(a.grad, b.grad) for a, b in zip(whole.parameters(), model.parameters(), strict=True)),
        "bytes": [traffic.total, c.n_layers * a_layer],
    }


def by_hand(causal: bool) -> list[float]:
    rank, n = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(4)
    whole = [torch.randn(2, 3, 20, 8, generator=generator).requires_grad_() for _ in range(3)]
    d_out = torch.randn(2, 3, 20, 8, generator=generator)
    out = attention(*whole, causal=causal)
    out.backward(d_out)
    own = [x.detach().chunk(n, 2)[rank].clone().requires_grad_() for x in whole]
    part = ring_attention(*own, causal=causal)
    part.backward(d_out.chunk(n, 2)[rank])
    pairs = [(out, part), *((a.grad, b.grad) for a, b in zip(whole, own, strict=True))]
    return [gap(a.chunk(n, 2)[rank], b) for a, b in pairs]


# --- pipeline ------------------------------------------------------------------------------------------------------


def pipeline(
    group: dist.ProcessGroup, data: dist.ProcessGroup | None, *, tied: bool, stages_per_rank: int, mixtures: bool,
    checkpointing: bool = False, n_rows: int = 8,
) -> dict[str, Any]:  # fmt: skip
    """Two steps' gradients of each pipeline's own rows, summed over pipelines, beside one rank's of all rows."""
    n, rank = group.size(), group.rank()
    mixture = {"n_experts": 4, "n_experts_per_token": 2, "expert_layers": [i % 2 == 0 for i in range(8)]}
    c = config(n_layers=8, tie_embeddings=tied, **(mixture if mixtures else {}))
    whole, model = made(c), made(c)
    keep_stages(model, rank, n, stages_per_rank=stages_per_rank)
    model.checkpointing = checkpointing
    n_data = 1 if data is None else data.size()
    line = Pipeline(model, group, n_rows=n_rows, micro_batch=2, seq_len=T, stages_per_rank=stages_per_rank)
    ids, targets = rows(n_rows * n_data)
    total = int((targets != -100).sum())
    loss = torch.zeros(())
    for start in range(0, len(ids), line.n_rows):
        part = whole(ids[start : start + line.n_rows], targets[start : start + line.n_rows]) / total
        part.backward()
        loss += part.detach()
    mine = slice(None) if data is None else slice(data.rank() * n_rows, (data.rank() + 1) * n_rows)
    for _ in range(2):  # the second step must not add to the first
        model.zero_grad()
        with Traffic(rank, n) as traffic:
            found = line.backward(ids[mine], targets[mine], factor=1 / total)
    for summed in (group, data):
        if summed is not None:
            dist.all_reduce(found, group=summed)
    names = dict(whole.named_parameters())
    gaps = []
    for name, parameter in model.named_parameters():
        if data is not None:
            dist.all_reduce(parameter.grad, group=data)
        gaps.append(gap(names[name].grad, parameter.grad))
    model.eval()
    whole.eval()
    odd = ids[:3], targets[:3]  # evaluation takes batches of any size
    expected_bytes = pipeline_bytes(
        rank=rank, n=n, n_micro=line.n_micro, rows=line.n_rows, seq_len=T, d_model=c.d_model,
        stages_per_rank=stages_per_rank, tied_numbers=V * c.d_model if tied else 0,
    )  # fmt: skip
    return {
        "loss": gap(found, loss),
        "gradients": max(gaps),
        "evaluation": gap(line.loss(*odd), whole(*odd)) / float(whole(*odd).detach()),
        "bytes": [traffic.total, expected_bytes],
        "names": sorted(dict(model.named_parameters())),
        "micro": [line.n_micro, line.n_rows],
    }


# --- experts -------------------------------------------------------------------------------------------------------


def experts(group: dist.ProcessGroup, *, width: int, checkpointing: bool) -> dict[str, Any]:
    """Gradients with experts dealt to ranks, each of which reads its own rows, beside one rank's of all rows."""
    n, rank = group.size(), group.rank()
    c = config(n_layers=2, n_experts=8, n_experts_per_token=2, balance_loss=0.0, d_expert=width)
    whole, model = made(c), made(c)
    ids, targets = rows(2 * n)
    loads: dict[str, list[list[int]]] = {"whole": [], "model": []}  # rows of each expert, a mixture at a time
    for name, of in (("whole", whole), ("model", model)):
        for layer in of.model.layers:
            note_loads(layer.mlp.experts, loads[name])
    whole(ids, targets).backward()
    model.checkpointing = checkpointing
    for layer in model.model.layers:
        owned = layer.mlp.experts
        owned.owners = Owners(group)
        for name in ("gate_up_proj", "down_proj"):
            setattr(owned, name, nn.Parameter(getattr(owned, name).detach().chunk(n)[rank].clone()))
    away = []
    for layer in model.model.layers:
        layer.mlp.experts.owners = counting(layer.mlp.experts.owners, rank, n, away)
    with Traffic(rank, n) as traffic:
        model(ids.chunk(n)[rank], targets.chunk(n)[rank]).backward()
    names, gaps = dict(whole.named_parameters()), []
    for name, parameter in model.named_parameters():
        expected = names[name].grad
        if ".experts." in name:
            expected = expected.chunk(n)[rank]
        else:
            dist.all_reduce(parameter.grad, group=group)
        gaps.append(gap(expected, parameter.grad))
    sent = sum(
        expert_bytes(n=n, n_rows_away=rows, n_experts=8, d_model=c.d_model, recomputed=checkpointing)
        for rows in away[: c.n_layers]
    )
    return {"gradients": max(gaps), "loads": loads, "bytes": [traffic.total, sent]}


def note_loads(module: nn.Module, loads: list[list[int]]) -> None:
    run = module.run

    def noted(x: Tensor, ends: Tensor) -> Tensor:
        loads.append(ends.diff(prepend=ends.new_zeros(1)).tolist())
        return run(x, ends)

    module.run = noted


def counting(owners: Owners, rank: int, n: int, away: list[int]) -> Any:
    """The same, and notes how many rows leave this rank or come to it."""

    def call(x: Tensor, ends: Tensor, run: Any) -> Tensor:
        per_rank = ends.diff(prepend=ends.new_zeros(1)).view(n, -1).sum(1)
        arrived = []

        def noted(received: Tensor, own_ends: Tensor) -> Tensor:
            arrived.append(len(received))
            return run(received, own_ends)

        out = owners(x, ends, noted)
        kept = int(per_rank[rank])
        away.append(len(x) - kept + arrived[0] - kept)
        return out

    return call


def every_axis(rank: int) -> dict[str, Any]:
    """What four ranks find, in pairs and all together."""
    world = dist.group.WORLD
    assert world is not None
    pairs = [dist.new_group(ranks) for ranks in ([0, 1], [2, 3])]
    across = [dist.new_group(ranks) for ranks in ([0, 2], [1, 3])]
    pair, data = pairs[rank // 2], across[rank % 2]
    found: dict[str, Any] = {}
    for name, group in (("pair", pair), ("all", world)):
        found[f"ring {name}"] = rings(group)
        found[f"half precision {name}"] = ring_in_half_precision(group)
        found[f"model {name}"] = [model_on_a_ring(group, recomputed=r) for r in (False, True)]
        found[f"experts {name}"] = experts(group, width=6 if name == "pair" else 16, checkpointing=name == "all")
    found["by hand"] = [by_hand(causal) for causal in (True, False)]
    found["pipelines"] = {
        "1f1b": pipeline(world, None, tied=False, stages_per_rank=1, mixtures=False),
        "tied, interleaved": pipeline(world, None, tied=True, stages_per_rank=2, mixtures=False, n_rows=9),
        "data, tied, mixtures": pipeline(pair, data, tied=True, stages_per_rank=1, mixtures=True),
        "interleaved, mixtures": pipeline(pair, data, tied=False, stages_per_rank=2, mixtures=True, checkpointing=True),
    }
    return found
