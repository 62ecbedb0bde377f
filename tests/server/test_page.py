"""The page for people: its files and headers, and a real browser in front of a real server."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from api_client import Api, MakeApi
from cupy_engine.server.pages import FOLDER
from live_server import TINY, LiveServer, wait_until

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
CHROMEDRIVER = shutil.which("chromedriver")
needs_chromium = pytest.mark.skipif(
    not (CHROMIUM and CHROMEDRIVER), reason="no headless browser (apt-get install chromium chromium-driver)"
)
FILES = sorted(path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*.*"))


def test_files_and_headers(make_api: MakeApi) -> None:
    """Without a key too: the page has to ask for it."""
    api = make_api(api_keys=("secret",))
    for path in ("/", *(f"/assets/{name}" for name in FILES)):
        response = api.http.get(path)
        response.close()
        assert response.status_code == 200, path
        policy = response.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        kind = {"js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}.get(path.rpartition(".")[2])
        assert response.content_type.startswith(kind or "text/html"), path
    assert api.http.get("/stats").status_code == 401


@pytest.mark.parametrize("path", ["../app.py", "..%2fapp.py", "js/../../app.py", "nothing.js", "js"])
def test_only_the_page_is_served(api: Api, path: str) -> None:
    assert api.http.get(f"/assets/{path}").status_code == 404


@pytest.mark.parametrize("name", FILES)
def test_nothing_from_outside_and_nothing_inline(name: str) -> None:
    text = (FOLDER / name).read_text().replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?://|//cdn|@import", text)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text)
    if name.endswith(".html"):
        assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", text)


def test_every_module_exists_and_is_reached() -> None:
    reached, queue = set(), ["js/app.js"]
    while queue:
        name = queue.pop()
        reached.add(name)
        found = {f"js/{each}" for each in re.findall(r'from "\./([\w.]+)"', (FOLDER / name).read_text())}
        queue += found - reached
    assert reached == {name for name in FILES if name.endswith(".js")}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "window-size=1200,800"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    environment = dict(os.environ) | {"SE_OFFLINE": "true"}
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(CHROMEDRIVER, env=environment))
    yield driver
    driver.quit()


class Page:
    """The page in a browser, opened afresh."""

    def __init__(self, browser: Any, url: str) -> None:
        self.browser = browser
        browser.get_log("browser")
        browser.get(url)

    def all(self, selector: str) -> list[Any]:
        return self.browser.find_elements("css selector", selector)

    def one(self, selector: str) -> Any:
        return self.browser.find_element("css selector", selector)

    def text(self, selector: str) -> str:
        found = self.all(selector)
        return found[-1].text if found else ""

    def wait(self, is_true: Any, what: str) -> None:
        wait_until(is_true, 30, f"{what}; {self.browser.get_log('browser')}")

    def ready(self) -> Page:
        self.wait(lambda: self.all(".pane option"), "models")
        return self

    def say(self, text: str) -> None:
        self.one("#message").send_keys(text + "\n")

    def set(self, name: str, value: str) -> None:
        script = "for (const e of document.querySelectorAll(arguments[0])) e.value = arguments[1]"
        self.browser.execute_script(script, f"[name={name}]", value)

    def finish(self) -> None:
        self.wait(lambda: self.all(".said.model") and not self.all(".busy"), "an answer")

    def complaints(self) -> list[str]:
        return [
            entry["message"] for entry in self.browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")
        ]


@pytest.fixture
def page(server: LiveServer, browser: Any) -> Page:
    return Page(browser, server.url).ready()


@needs_chromium
def test_chat_streams_and_remembers(page: Page) -> None:
    page.set("temperature", "0")
    page.set("max_tokens", "24")
    page.say("What is the capital of France?")
    page.finish()
    assert "Paris" in page.text(".said.model .content")
    assert re.search(r"\d+ tokens · first after [\d.]+ m?s · [\d.]+ tokens/s", page.text(".figures"))
    page.say("And of Italy?")
    page.finish()
    assert len(page.all(".said")) == 4
    page.one("#clear").click()
    assert not page.all(".said")
    assert not page.complaints()


@needs_chromium
def test_stop(page: Page, server: LiveServer) -> None:
    """Greedy, as the model then counts on to the last token it may have."""
    page.set("mode", "text")
    page.set("temperature", "0")
    page.set("max_tokens", "1500")
    page.say("1, 2, 3, 4, 5,")
    page.wait(lambda: len(page.text(".said.model .content")) > 5, "the first words")
    page.one("#stop").click()
    page.finish()
    assert "stopped" in page.text(".figures")
    assert page.one("#send").is_displayed()
    wait_until(server.is_idle, 10, "the engine is idle again")


@needs_chromium
def test_side_by_side_with_probabilities(page: Page) -> None:
    page.one("#compare").click()
    page.one("#logprobs").click()
    page.set("max_tokens", "4")
    page.say("Hello <b>there</b> & everybody")
    page.finish()
    assert len(page.all(".pane")) == len(page.all(".said.model")) == 2
    assert page.text(".said.user") == "Hello <b>there</b> & everybody"
    token = page.all(".token")[0]
    page.browser.execute_script("arguments[0].focus()", token)
    page.wait(lambda: len(page.all("#tooltip > div")) >= 5, "alternatives")
    assert page.text("#tooltip .chosen .number").endswith("%")
    page.all(".pane .remove")[1].click()
    assert len(page.all(".pane")) == 1
    assert not page.complaints()


@needs_chromium
def test_text_is_continued(page: Page) -> None:
    page.set("mode", "text")
    page.set("temperature", "0")
    page.set("max_tokens", "6")
    page.one("#logprobs").click()
    page.say("The capital of France is")
    page.finish()
    assert "Paris" in page.text(".said.model .content")
    assert len(page.all(".token")) == 6
    assert not page.complaints()


@needs_chromium
def test_errors_are_shown_where_they_happen(page: Page) -> None:
    page.set("stop", "|".join("abcdefghijklmnopqrstuvwxyz"))
    page.say("Hi")
    page.finish()
    assert "stop" in page.text(".said .error")


@needs_chromium
def test_live_view(page: Page, server: LiveServer) -> None:
    with server.open_running_stream({"prompt": "Once", "max_tokens": 900, "ignore_eos": True}):
        page.one("#tab-live").click()
        figures = dict.fromkeys(["Output tokens/s", "Running"], "")

        def moves() -> bool:
            for figure in page.all(".figure"):
                name, _, value = figure.text.partition("\n")
                figures[name] = value
            return figures["Running"] == "1" and figures["Output tokens/s"] not in ("", "–", "0")

        page.wait(moves, "figures of a running stream")
        assert len(page.all(".sequence")) == 1
        assert "1 decode" in page.text(".batch + p")
        assert re.search(r"\d+ of [\d,]+ blocks in use", page.text(".blocks + p"))
    page.wait(lambda: moves() or figures["Running"] == "0", "the end of the stream")
    assert not page.complaints()


@needs_chromium
def test_phone_has_no_sideways_scrolling(page: Page) -> None:
    phone = {"width": 360, "height": 700, "deviceScaleFactor": 2, "mobile": True}
    page.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    try:
        for tab in ("live", "chat"):
            page.one(f"#tab-{tab}").click()
            width = page.browser.execute_script("return document.documentElement.scrollWidth")
            assert width <= 360, tab
        send = page.one("#send").rect
        assert send["x"] + send["width"] <= 360
        assert send["y"] + send["height"] <= 700
    finally:
        page.browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@needs_chromium
def test_asks_for_a_key(browser: Any) -> None:
    with LiveServer.serve(str(TINY), "--api-key", "open-sesame", "--workers", "1") as server:
        page = Page(browser, server.url)
        page.wait(lambda: page.one("#key-dialog").is_displayed(), "the key dialog")
        page.one("#key").send_keys("wrong\n")
        page.wait(lambda: "does not know" in page.text("#key-error"), "a refusal")
        page.one("#key").send_keys("open-sesame\n")
        page.ready()
        assert not page.one("#key-dialog").is_displayed()
        stored = "return [JSON.stringify(sessionStorage), JSON.stringify(localStorage), document.cookie]"
        session, *elsewhere = page.browser.execute_script(stored)
        assert "open-sesame" in session
        assert elsewhere == ["{}", ""]


def test_the_wheel_has_the_page() -> None:
    """Every file matches a pattern of pyproject's package data."""
    import tomllib

    settings = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    patterns = settings["tool"]["setuptools"]["package-data"]["cupy_engine.server"]
    packed = {path for pattern in patterns for path in FOLDER.parent.glob(pattern) if path.is_file()}
    assert packed == {FOLDER / name for name in FILES}


@needs_chromium
def test_several_models(browser: Any, tmp_path: Path) -> None:
    """Panes begin with different models, and the live view has a part for each engine."""
    file = tmp_path / "models.toml"
    file.write_text("".join(f'[[models]]\nname = "{name}"\nmodel = "{TINY}"\n' for name in ("one", "two")))
    with LiveServer.serve("--config", str(file), "--workers", "1") as server:
        page = Page(browser, server.url).ready()
        page.one("#compare").click()
        chosen = [each.get_property("value") for each in page.all(".pane summary select")]
        assert chosen == ["one", "two"]
        page.one("#tab-live").click()
        page.wait(lambda: len(page.all(".engine .figure strong")) >= 16, "both engines")
        assert {each.text.split()[0] for each in page.all(".engine h2")} == {"one", "two"}


MARKDOWN = [
    ("plain *soft* and **strong** `x<y`", "<p>plain <em>soft</em> and <strong>strong</strong> <code>x&lt;y</code></p>"),
    ("# Head\ntext\nmore\n\nnext", "<h3>Head</h3><p>text\nmore</p><p>next</p>"),
    ("- a\n- b\n  c\n1. d", "<ul><li>a</li><li>b\nc</li></ul><ol><li>d</li></ol>"),
    ("```py\nif a < b:\n\n    # no head\n```\nend", "<pre><code>if a &lt; b:\n\n    # no head</code></pre><p>end</p>"),
    ("```\nstill open", "<pre><code>still open</code></pre>"),
    ("> said\n---\n2 * 3 * 4", "<blockquote>said</blockquote><hr><p>2 * 3 * 4</p>"),
    ("<img src=x onerror=alert(1)>", "<p>&lt;img src=x onerror=alert(1)&gt;</p>"),
    ("[click](javascript:alert(1))", "<p>[click](javascript:alert(1))</p>"),
    ("", ""),
]


@needs_chromium
def test_markdown(page: Page) -> None:
    script = """
        const [texts, done] = [arguments[0], arguments[1]];
        import("/assets/js/markdown.js").then(({ markdown }) => done(texts.map((text) => {
            const holder = document.createElement("div");
            holder.append(markdown(text));
            return holder.innerHTML.replaceAll(' class=""', "").replaceAll(' tabindex="0"', "");
        })), (error) => done([String(error)]))
    """
    made = page.browser.execute_async_script(script, [text for text, _ in MARKDOWN])
    assert made == [expected for _, expected in MARKDOWN]
