"""`graft launch`: several processes on this machine."""

from typing import Annotated

import typer


def launch(
    command: typer.Context,
    nproc: Annotated[int, typer.Option("--nproc", "--nproc-per-node", help="Ranks to start.")],
    max_restarts: Annotated[
        int,
        typer.Option(
            "--max-restarts", help="Start the ranks again so often after a failure; they go on by themselves."
        ),
    ] = 0,
    rank_timeout: Annotated[
        float | None, typer.Option("--rank-timeout", help=r"Seconds that a rank waits for another. \[default: 600]")
    ] = None,
) -> None:
    """Run a training command on several processes of this machine, by torchrun; its options come first.

    Example: graft launch --nproc 2 --max-restarts 3 pretrain --data runs/tokens --tokenizer runs/tokenizer --out runs/base
    """
    from .launcher import launch as start

    raise typer.Exit(start(command.args, n_ranks=nproc, max_restarts=max_restarts, rank_timeout_s=rank_timeout))
