"""The page in a real browser: a chat, two models beside each other, probabilities, keys, a phone, the dark."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")

from graft.finetune.serve.battles import Arena

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine; apt-get install chromium")
    with playwright.sync_playwright() as running:
        launched = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # playwright's own use of asyncio
def test_the_page(
    browser: Any, served_base: Path, adapters_dir: Path, serving: Callable[..., Any], alone: Any, tmp_path: Path
) -> None:
    """What the page shows is the greedy answer of the bare engine; a vote is a line on disk; no error reaches the console."""
    with serving(served_base, adapters_dir, arena=Arena(tmp_path / "arena")) as live:
        look_at(browser, live, alone, tmp_path)


def look_at(browser: Any, live: Any, alone: Any, tmp_path: Path) -> None:
    page = browser.new_page(viewport={"width": 1100, "height": 760})
    trouble: list[str] = []
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.on("console", lambda line: trouble.append(line.text) if line.type == "error" else None)
    page.goto(live.url)
    # Selectors and no wait_for_function, which evaluates strings: the page's own security policy refuses that.
    page.wait_for_selector("#left option >> nth=6", state="attached")
    assert page.locator("#left option").count() == 7
    page.select_option("#left", "ant")
    page.fill("#temperature", "0")
    page.fill("#tokens", "24")
    page.fill("#prompt", "the cat sat")
    page.press("#prompt", "Enter")  # the keyboard sends
    page.wait_for_selector("#talk0 .facts:not(:empty)")
    expected = alone.text("ant", [{"role": "user", "content": "the cat sat"}], 24)
    shown = page.evaluate("document.querySelector('#talk0 .assistant').firstChild.textContent")
    assert shown == expected
    page.hover("#talk0 .token >> nth=0")
    hint = page.text_content("#hint")
    assert page.is_visible("#hint")
    assert len(hint.splitlines()) == 5
    assert re.match(r" *\d+\.\d %  ", hint)
    page.wait_for_selector("#panel:has-text('tokens/s')")

    page.check("#compare")
    page.select_option("#right", "bee")
    page.fill("#prompt", "rivers run")
    page.press("#prompt", "Enter")
    for side in (0, 1):
        page.wait_for_selector(f"#talk{side} .facts:not(:empty)")
    for side, name in enumerate(("ant", "bee")):
        found = page.evaluate(f"document.querySelector('#talk{side} .assistant').firstChild.textContent")
        assert found == alone.text(name, [{"role": "user", "content": "rivers run"}], 24)
    page.screenshot(path=tmp_path / "page.png")
    page.wait_for_selector("#vote:not([hidden])")
    page.keyboard.press("Alt+Digit2")
    page.wait_for_selector(".turn.facts:has-text('your vote is number 1')")
    assert page.is_hidden("#vote")
    [line] = (tmp_path / "arena" / "battles.jsonl").read_text(encoding="utf-8").splitlines()
    battle = json.loads(line)
    assert (battle["a"], battle["b"], battle["winner"], battle["prompt"]) == ("ant", "bee", "b", "rivers run")
    assert battle["answer_b"] == alone.text("bee", [{"role": "user", "content": "rivers run"}], 24)
    page.focus("#talk0")
    page.keyboard.press("ArrowRight")  # the probabilities without a mouse
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.className") == "token"
    assert page.is_visible("#hint")
    page.emulate_media(color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(22, 24, 26)"
    page.set_viewport_size({"width": 390, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390  # a phone need not scroll sideways
    assert page.is_visible("#send")
    page.screenshot(path=tmp_path / "phone.png")

    page.fill("#tokens", "400")
    page.fill("#prompt", "birds drink")
    page.press("#prompt", "Enter")
    page.wait_for_selector("#stop:not([disabled])")
    page.keyboard.press("Escape")
    page.wait_for_selector("#send:not([disabled])")
    page.click("#fresh")
    assert page.locator(".turn").count() == 0
    assert trouble == []
    page.close()
