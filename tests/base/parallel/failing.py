"""What each of three ranks runs in test_watch.py: python failing.py FOLDER. Writes FOLDER/RANK.json."""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from graft.base.optim.adamw import AdamW
from graft.base.parallel import same
from graft.base.parallel.ranks import at, join, naming_lost_ranks, watch
from graft.base.parallel.stragglers import WINDOW, Stragglers
from graft.base.precision import LossScaler
from graft.base.run import TrainConfig
from graft.base.training.step import one_step


def refusal(check: Callable[[], None]) -> str:
    try:
        check()
    except (ValueError, ConnectionError) as error:
        return str(error)
    return ""


def main(folder: Path) -> None:
    together, _ = join("cpu")
    same.SEEN_S = 0.3
    rank = together.rank
    found: dict[str, object] = {
        "different": refusal(
            lambda: same.check_same(together, {"seed": 2} if rank == 1 else {"seed": 1, "torch": "a"})
        ),
        "equal": refusal(lambda: same.check_same(together, {"seed": 3})),
        "unseen": refusal(lambda: same.check_visible(together, folder / "elsewhere" if rank == 2 else folder)),
    }
    model = nn.Linear(2, 1)
    optimizer, stragglers = AdamW(model.named_parameters(), learning_rate=0.1), Stragglers()

    def loss(net: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        if rank == 1:
            time.sleep(0.03)
        return net(batch["ids"]).sum()

    for step in range(WINDOW):
        if rank == 0:
            time.sleep(0.01)  # while making the batch: too little to be slow
        line = one_step(
            *(model, optimizer, [{"ids": torch.ones(1, 2)}], TrainConfig(), LossScaler("float32"), step),
            *(loss, lambda batch: 1, "cpu"),
            together=together,
            stragglers=stragglers,
        )
    found["slow"] = {name: value for name, value in line.items() if "rank" in name}

    def other_error() -> None:
        with naming_lost_ranks(together):
            raise RuntimeError("a bug")

    try:
        other_error()
    except RuntimeError as error:
        found["other error"] = str(error)

    def hang() -> None:
        at("step 6")
        together.wait()
        if rank == 2:
            while len(list(folder.glob("[01].json"))) < 2:
                time.sleep(0.05)
            return
        at("step 7")
        together.sum(1.0)

    watch().grace_s = 1.0
    found["hung"] = refusal(hang)
    written = folder / f"{rank}.json"
    written.with_suffix(".tmp").write_text(json.dumps(found))
    written.with_suffix(".tmp").rename(written)
    while rank == 0 and len(list(folder.glob("?.json"))) < 3:  # it holds the store
        time.sleep(0.05)
    os._exit(0)  # the group is broken


if __name__ == "__main__":
    main(Path(sys.argv[1]))
