"""What each rank runs in test_reference.py: python ranks.py RANK N_RANKS STORE RESULTS. Writes a JSON of named results."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from graft.base.parallel.reference.ddp import DDP
from graft.base.parallel.reference.ring import ring_all_reduce_
from graft.base.parallel.reference.tensor_parallel import ColumnLinear, RowLinear
from graft.base.parallel.reference.zero import ShardedOptimizer


class Net(nn.Module):
    """Two layers, one of them frozen, one without a gradient, one parameter that stands twice, a buffer."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second = nn.Linear(6, 12), nn.Linear(12, 6)
        self.frozen, self.unused = nn.Linear(6, 6), nn.Linear(3, 3)
        self.tied = self.second.weight
        self.frozen.requires_grad_(False)
        self.register_buffer("scale", torch.rand(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.frozen(self.second(F.gelu(self.first(x)))) * self.scale


def numbers(module: nn.Module) -> list[float]:
    return torch.cat([p.detach().flatten() for p in module.parameters()]).tolist()


def rows(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(12, 6, generator=generator), torch.randn(12, 6, generator=generator)


def trained(rank: int, n: int, bucket_mb: float | None, *, sharded: bool, micro: int = 1) -> dict[str, object]:
    """Five steps on this rank's rows; with rank -1 alone on all rows."""
    alone = rank < 0
    net = Net(seed=0 if alone else rank)
    model = net if alone else DDP(net, bucket_mb=bucket_mb)
    groups = [
        {"params": [*net.first.parameters()], "lr": 0.05},
        {"params": [*net.second.parameters(), *net.unused.parameters()], "weight_decay": 0.3},
    ]
    options = {"lr": 0.02, "weight_decay": 0.1}
    optimizer = (
        ShardedOptimizer(groups, torch.optim.AdamW, **options) if sharded else torch.optim.AdamW(groups, **options)
    )
    for step in range(5):
        x, y = (t if alone else t.chunk(n)[rank] for t in rows(step))
        if step == 3:
            optimizer.param_groups[0]["lr"] = 0.01  # as a schedule does
        for i, (a, b) in enumerate(zip(x.chunk(micro), y.chunk(micro), strict=True)):
            loss = F.mse_loss(model(a), b) / micro
            if not alone and i < micro - 1:
                with model.no_sync():
                    loss.backward()
            else:
                loss.backward()
        if not alone:
            model.finish_gradient_synchronization()
        elif net.unused.weight.grad is None:  # as every rank's is after the sum
            for p in net.unused.parameters():
                p.grad = torch.zeros_like(p)
        optimizer.step()
        optimizer.zero_grad()
    state = optimizer.state_bytes if isinstance(optimizer, ShardedOptimizer) else None
    return {"weights": numbers(net), "buckets": None if alone else len(model.buckets), "state_bytes": state}


class Paths(nn.Module):
    """Each rank's loss reaches other layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(4))

    def forward(self, x: torch.Tensor, path: list[int]) -> torch.Tensor:
        for i in path:
            x = x + self.layers[i](x).tanh()
        return x.square().mean()


def paths(rank: int, n: int) -> dict[str, object]:
    """Two steps' gradients where ranks complete their buckets in different orders, or not at all, beside those of one process."""
    ways = [[0, 1, 2, 3], [3, 0], [1, 2, 1]]
    inputs = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(7))
    model, alone = DDP(Paths(), bucket_mb=0), Paths()
    gaps = []
    for step in range(2):
        model.zero_grad(), alone.zero_grad()
        turn = [(r + step) % n for r in range(n)]
        model(inputs[rank], ways[turn[rank]]).backward()
        model.finish_gradient_synchronization()
        sum(alone(inputs[r], ways[turn[r]]) / n for r in range(n)).backward()
        pairs = zip(model.module.parameters(), alone.parameters(), strict=True)
        gaps += [float((a.grad - b.grad).abs().max()) for a, b in pairs]
    return {"gaps": gaps}


def groups(rank: int) -> dict[str, object]:
    """Groups as users give them: a generator, names, none of the settings, one added later; the state saved and loaded."""
    net, plain = Net(seed=0), Net(seed=0)
    shared = ShardedOptimizer(net.first.named_parameters(), torch.optim.AdamW)
    alone = torch.optim.AdamW(plain.first.named_parameters())
    shared.add_param_group({"params": net.second.named_parameters(), "lr": 0.1})
    alone.add_param_group({"params": plain.second.named_parameters(), "lr": 0.1})
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)) for o in (shared, alone)]

    def step(optimizer: torch.optim.Optimizer, module: Net) -> None:
        optimizer.zero_grad()
        module(rows(0)[0]).square().mean().backward()
        optimizer.step()

    for optimizer, module, schedule in zip((shared, alone), (net, plain), schedules, strict=True):
        step(optimizer, module)
        schedule.step()
    saved, again = shared.state_dict(), ShardedOptimizer(net.first.parameters(), torch.optim.AdamW)
    again.add_param_group({"params": net.second.parameters(), "lr": 0.7})
    again.load_state_dict(saved)
    step(again, net), step(alone, plain)
    gap = max(abs(a - b) for a, b in zip(numbers(net), numbers(plain), strict=True))
    return {"gap": gap, "rates": [group["lr"] for group in shared.param_groups]}


def second_backward(rank: int) -> str:
    model = DDP(Net(seed=rank), bucket_mb=0)
    x, _ = rows(0)
    model(x).sum().backward()
    try:
        model(x).sum().backward()
    except RuntimeError as error:
        model.finish_gradient_synchronization()
        return str(error)
    return ""


def ring(rank: int) -> dict[str, object]:
    torch.manual_seed(rank)
    tensor, strided = torch.randn(7, 3), torch.randn(4, 6).T
    before = tensor.clone(), strided.clone()
    expected = [t.clone() for t in before]
    for t in expected:
        dist.all_reduce(t)
    sent = ring_all_reduce_(tensor)
    ring_all_reduce_(strided)
    gap = max(float((a - b).abs().max()) for a, b in zip((tensor, strided), expected, strict=True))
    return {"gap": gap, "sent": sent, "sum": tensor.flatten().tolist()}


def tensor_parallel(rank: int, n: int) -> dict[str, object]:
    torch.manual_seed(5)
    up, down = nn.Linear(6, 4 * n), nn.Linear(4 * n, 6)
    x = torch.randn(5, 6)
    whole_x, part_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    column, row = ColumnLinear(up), RowLinear(down)
    whole = down(F.gelu(up(whole_x)))
    part = row(F.gelu(column(part_x)))
    whole.square().sum().backward()
    part.square().sum().backward()
    pairs = [
        (whole, part),
        (whole_x.grad, part_x.grad),
        (up.weight.grad.chunk(n)[rank], column.weight.grad),
        (up.bias.grad.chunk(n)[rank], column.bias.grad),
        (down.weight.grad.chunk(n, 1)[rank], row.weight.grad),
        (down.bias.grad, row.bias.grad),
    ]
    try:
        ColumnLinear(nn.Linear(6, 4 * n + 1))
    except ValueError as error:
        message = str(error)
    else:
        message = ""
    return {"gaps": [float((a - b).abs().max()) for a, b in pairs], "message": message}


def main(rank: int, n: int, store: str, out: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=n)
    found = {
        "one bucket": trained(rank, n, None, sharded=False),
        "a bucket a parameter": trained(rank, n, 0.0, sharded=False),
        "micro-batches": trained(rank, n, 0.0002, sharded=False, micro=2),
        "sharded": trained(rank, n, 25.0, sharded=True),
        "alone": trained(-1, 1, 0.0, sharded=False),
        "paths": paths(rank, n),
        "groups": groups(rank),
        "second backward": second_backward(rank),
        "ring": ring(rank),
        "tensor parallel": tensor_parallel(rank, n),
    }
    out.write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
