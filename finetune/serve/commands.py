"""`graft serve` on the command line."""

import os
from pathlib import Path
from typing import Annotated

import typer

KEY_VARIABLE = "GRAFT_API_KEY"


def serve(
    base: Annotated[Path, typer.Option("--base", help="Model folder in Hugging Face's layout.")],
    adapters: Annotated[
        Path | None, typer.Option("--adapters", help="Folder whose subfolders are adapters, loaded on first use.")
    ] = None,
    adapter: Annotated[
        list[str] | None, typer.Option("--adapter", help="NAME=DIR: an adapter elsewhere; can be repeated.")
    ] = None,
    host: Annotated[str, typer.Option("--host", help="0.0.0.0 serves every network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", help="0 takes a free one.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option("--api-key", help=f"Clients must send it; better set {KEY_VARIABLE}, which ps can't show."),
    ] = None,
    allow_adapter_changes: Annotated[
        bool, typer.Option("--allow-adapter-changes", help="Let clients load and unload adapters below --adapters.")
    ] = False,
    max_batch: Annotated[int, typer.Option("--max-batch", help="Answers decoded at once.")] = 8,
    max_queue: Annotated[int, typer.Option("--max-queue", help="Answers that may wait; more get 429.")] = 64,
    max_adapters: Annotated[int, typer.Option("--max-adapters", help="Adapters kept in memory.")] = 64,
    adapter_budget: Annotated[
        str | None, typer.Option("--adapter-budget", help=r"Memory for adapters, such as 512MiB. \[default: no limit]")
    ] = None,
    pin: Annotated[
        list[str] | None, typer.Option("--pin", help="Adapter that stays in memory; can be repeated.")
    ] = None,
    max_body_bytes: Annotated[int, typer.Option("--max-body-bytes", help="Largest request.")] = 2 << 20,
    prefix_cache_mib: Annotated[
        int, typer.Option("--prefix-cache-mib", help="Memory for prompts read before; 0 turns it off.")
    ] = 256,
    cache_mib: Annotated[
        int | None,
        typer.Option(
            "--cache-mib", help=r"Memory for answers and kept prompts, shared in pages. \[default: rows of full length]"
        ),
    ] = None,
    speculate: Annotated[
        str | None, typer.Option("--speculate", help="Guess tokens ahead: ngram, or the folder of a small model.")
    ] = None,
    arena: Annotated[
        Path | None, typer.Option("--arena", help="Folder for battles.jsonl: the votes between answers side by side.")
    ] = None,
    timeout: Annotated[float, typer.Option("--timeout", help="Seconds for an answer, waiting included.")] = 600.0,
    access_log: Annotated[
        bool, typer.Option("--access-log/--no-access-log", help="One JSON line a request on standard error.")
    ] = True,
    dtype: Annotated[str, typer.Option("--dtype", help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Serve a base and its adapters in OpenAI's API, with a page to talk to them.

    Example: graft serve --base runs/demo/base --adapters runs/demo/adapters
    """
    from importlib.util import find_spec

    from ...base.extras import how_to_install

    if find_spec("fastapi") is None or find_spec("uvicorn") is None:
        raise ValueError(f"graft serve needs FastAPI and uvicorn: {how_to_install('serve')}")
    from ..memory.units import parse_bytes
    from ..session import named_folders
    from .app import Limits
    from .server import ServeConfig, run_serve

    run_serve(
        ServeConfig(
            base=base,
            adapters=adapters,
            named=named_folders(adapter or []),
            host=host,
            port=port,
            api_key=api_key or os.environ.get(KEY_VARIABLE) or None,
            allow_adapter_changes=allow_adapter_changes,
            max_batch=max_batch,
            max_adapters=max_adapters,
            adapter_budget=None if adapter_budget is None else parse_bytes(adapter_budget),
            pinned=tuple(pin or []),
            prefix_cache_mib=prefix_cache_mib,
            cache_mib=cache_mib,
            speculate=speculate,
            arena=arena,
            limits=Limits(max_queue=max_queue, max_body_bytes=max_body_bytes, timeout_s=timeout),
            dtype=dtype,
            device=device,
            access_log=access_log,
        )
    )
