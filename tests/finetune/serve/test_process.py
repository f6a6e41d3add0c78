"""`graft serve` as its own process: ready, draining, refusing in one line."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("fastapi")


@pytest.fixture
def started(served_base: Path, adapters_dir: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server on a free port, and its address."""
    command = [sys.executable, "-m", "graft", "serve", "--base", str(served_base), "--adapters", str(adapters_dir)]
    process = subprocess.Popen(
        [*command, "--port", "0"], stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert process.stderr is not None
    line = process.stderr.readline()
    found = re.fullmatch(r"graft serve: tiny-base and 6 adapters on (http://127.0.0.1:\d+)\n", line)
    assert found, line
    yield process, found[1]
    process.kill()
    process.wait()
    process.stderr.close()


@pytest.mark.slow
def test_sigterm_lets_answers_end(started: tuple[subprocess.Popen[str], str], until: Callable[..., None]) -> None:
    """A stream that runs when SIGTERM comes is whole; new connections are refused; exit code 0; the log has no contents."""
    process, url = started

    def ready() -> bool:
        try:
            return httpx.get(f"{url}/health").status_code == 200
        except httpx.TransportError:
            return False

    until(ready)
    body = {"model": "ant", "messages": [{"role": "user", "content": "a secret bird"}], "max_tokens": 400,
            "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}  # fmt: skip
    lines: list[str] = []
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as answer:
        rows = answer.iter_lines()
        lines.append(next(rows))
        process.send_signal(signal.SIGTERM)
        lines += [line for line in rows if line]
    assert lines[-1] == "data: [DONE]"
    assert json.loads(lines[-2].removeprefix("data: "))["usage"]["completion_tokens"] == 400
    assert process.wait(timeout=30) == 0
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health")
    assert process.stderr is not None
    log = process.stderr.read()
    assert "secret" not in log
    entries = [json.loads(line) for line in log.splitlines()]
    [entry] = [entry for entry in entries if entry["route"] == "/v1/chat/completions"]
    assert (entry["model"], entry["completion_tokens"], entry["status"]) == ("ant", 400, 200)


def test_bad_starts_are_one_line(served_base: Path, graft: Callable[..., Any], tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = graft("serve", "--base", served_base, "--port", port)
    assert (done.returncode, done.stderr) == (
        1,
        f"graft: port {port} of 127.0.0.1 is in use; give another one by --port\n",
    )


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"port": 70000}, "port=70000 must lie in"),
        ({"max_batch": 0}, "max_batch=0 must be >= 1"),
        ({"prefix_cache_mib": -1}, "prefix_cache_mib=-1"),
        ({"api_key": "schlüssel"}, "the API key is empty or not ASCII"),
        ({"adapters": Path("nowhere")}, "the adapters' folder nowhere does not exist"),
        ({"host": "no.such.host.invalid"}, "host 'no.such.host.invalid' is unknown"),
    ],
)
def test_bad_settings_are_named(served_base: Path, options: dict[str, Any], part: str) -> None:
    from graft.finetune.serve.server import ServeConfig, run_serve

    with pytest.raises((ValueError, OSError), match=re.escape(part)):
        run_serve(ServeConfig(**{"base": served_base, "port": 0, **options}))


def test_a_slow_loris_is_closed(live: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that sends its headers byte by byte is cut off after the time, however busy it keeps the line."""
    from graft.finetune.serve import guard

    monkeypatch.setattr(guard, "HEADER_SECONDS", 0.5)
    with socket.create_connection(("127.0.0.1", int(live.url.rsplit(":", 1)[1])), timeout=10) as raw:
        began, closed = time.monotonic(), threading.Event()

        def drip() -> None:
            try:
                for byte in b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"X-A: b\r\n" * 500:
                    if closed.is_set():
                        return
                    raw.sendall(bytes([byte]))
                    time.sleep(0.05)
            except OSError:
                pass

        dripping = threading.Thread(target=drip)
        dripping.start()
        with suppress(ConnectionResetError):
            assert raw.recv(100) == b""
        closed.set()
        dripping.join()
        assert 0.3 < time.monotonic() - began < 5
