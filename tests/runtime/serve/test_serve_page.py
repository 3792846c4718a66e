"""The web page in a real browser. Skipped where Chromium is not installed."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.serving import NO_END, Server, serving, until

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
                None)  # fmt: skip
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on this machine (Debian: apt-get install chromium)"
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        # Root in a container has no user namespaces for the sandbox, and the page is trusted.
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server(sliding_bundle: Path) -> Iterator[Server]:
    with serving(sliding_bundle, "--rows", 2, "--max-new-tokens", 1_000_000) as running:
        yield running


@pytest.fixture
def page(browser: Any, server: Server) -> Iterator[Any]:
    page = browser.new_page()
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on(
        "console",
        lambda message: (
            wrong.append(message.text)
            if message.type == "error" and "Failed to load resource" not in message.text
            else None
        ),
    )
    page.on("request", lambda request: None if request.url.startswith((server.url, "data:"))
            else wrong.append(request.url))  # fmt: skip
    page.goto(server.url)
    page.wait_for_selector("#state[data-state=ready]")
    yield page
    page.close()
    assert wrong == [], "errors, a violated policy, or requests to other hosts"


def answered(page: Any) -> str:
    page.wait_for_selector("#send:not([hidden])")
    text: str = page.locator(".message[data-role=assistant] span").last.text_content()
    return text


def test_a_question_is_answered_by_keyboard_alone(page: Any, server: Server) -> None:
    page.fill("#max_tokens", "8")
    page.focus("#prompt")
    page.keyboard.type("Hello")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("there")
    page.keyboard.press("Enter")
    page.wait_for_selector(".message[data-role=assistant] footer:not(:empty)")
    messages = [{"role": "user", "content": "Hello\nthere"}]
    asked = {"model": "tiny", "messages": messages, "max_tokens": 8}
    expected = server.ask("/v1/chat/completions", asked).json()["choices"][0]["message"]["content"]
    assert answered(page) == expected
    assert page.locator(".message[data-role=user]").text_content() == "Hello\nthere"
    note = page.locator(".message footer").last.text_content()
    assert re.match(r"\d tokens · first token after \d+ ms", note)
    assert page.evaluate("document.activeElement.id") == "prompt"


def test_an_answer_streams_shows_in_the_metrics_and_can_be_stopped(
    page: Any, server: Server
) -> None:
    def without_end(route: Any) -> None:  # otherwise the model could end its text at any time
        route.continue_(post_data=json.dumps(route.request.post_data_json | {"logit_bias": NO_END}))

    page.route("**/v1/completions", without_end)
    page.select_option("#mode", "text")
    page.fill("#max_tokens", "1000000")
    page.fill("#prompt", "On and on")
    page.click("#send")
    answer = page.locator(".message[data-role=assistant] span").last
    until(lambda: len(answer.text_content()) > 20, "some text")
    before = len(answer.text_content())
    until(lambda: len(answer.text_content()) > before, "more text")
    until(lambda: page.locator("#running").text_content() == "1", "a row in use on the page")
    until(lambda: page.locator("#rate").text_content() not in ("–", "0", "0.0"), "a rate")
    assert page.locator("#rows li").count() == 2
    assert "L" in page.get_attribute("#curve", "d")
    page.keyboard.press("Escape")
    until(lambda: server.metric("running_rows") == 0, "the end of the request")
    assert "stopped" in page.locator(".message footer").last.text_content()
    assert page.is_visible("#send")


def test_an_error_message_is_shown(page: Any) -> None:
    page.select_option("#mode", "text")
    page.fill("#temperature", "9")
    page.fill("#prompt", "Too hot")
    with page.expect_response("**/v1/completions"):
        page.click("#send")
    page.wait_for_selector(".message[data-role=error]")
    assert "temperature" in page.locator(".message[data-role=error]").text_content()


def test_every_control_has_a_name_and_both_schemes_have_contrast(page: Any) -> None:
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll("button, input, select, textarea")].filter(
            e => !e.labels?.length && !e.getAttribute("aria-label") && !e.textContent.trim()
        ).map(e => e.outerHTML)"""
    )
    assert unnamed == []
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        colors = page.evaluate(
            """() => ["--ground", "--panel", "--ink", "--soft", "--accent", "--bad", "--on-accent",
                      "--mine"].map(
                n => [n, getComputedStyle(document.documentElement).getPropertyValue(n).trim()])"""
        )
        of = {name: _luminance(color) for name, color in colors}
        for ink in ("--ink", "--soft", "--bad"):
            for ground in ("--ground", "--panel"):
                assert _contrast(of[ink], of[ground]) >= 4.5, f"{ink} on {ground}, {scheme} (WCAG)"
        assert _contrast(of["--ink"], of["--mine"]) >= 4.5
        assert _contrast(of["--on-accent"], of["--accent"]) >= 4.5


def test_the_page_asks_for_a_key_and_uses_it(browser: Any, plain_bundle: Path) -> None:
    with serving(plain_bundle, MISTRALC_API_KEYS="secret") as server:
        page = browser.new_page()
        page.goto(server.url)
        page.get_by_text("needs an API key").wait_for()
        page.fill("#key", "secret")
        page.keyboard.press("Tab")
        page.wait_for_selector("#state[data-state=ready]")
        until(lambda: page.locator("#model").text_content() == "tiny", "the model's name")
        page.close()


def _luminance(color: str) -> float:
    """Relative luminance of #rrggbb (WCAG 2.2)."""
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(one: float, other: float) -> float:
    return (max(one, other) + 0.05) / (min(one, other) + 0.05)
