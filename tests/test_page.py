"""The report page in a real browser: no errors, every figure drawn, selectors work, nothing fetched, fits a phone.

Headless Chromium, spoken to through its debugging pipe (Chrome DevTools Protocol); skipped where it is not installed.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from test_view import fake_owner, fake_rows

from winnow import view
from winnow.measure import pack
from winnow.measure.record import Row
from winnow.view import overlay
from winnow.view.sheets import telling

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --remote-debugging-pipe"
).split()
METHODS = ("ToMe(r=8)", "EViT(keep=Keep(0.5))", "TopK(keep=Keep(0.5))")
MAPS = ((-1, 1, 3, 7, 11), (3, 11), (7, 9, 11))
"""After which blocks each method changed something."""
PHOTOS = ("cat.jpg", "dog.jpg", "a bowl of fruit.jpg")
PATIENCE = 60
"""Seconds until the browser is given up."""

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: the page is not opened in a browser")


class Browser:
    """One Chromium with one tab; what it complains about and asks for is kept."""

    def __init__(self, home) -> None:
        to_read, to_write = os.pipe(), os.pipe()
        theirs = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (to_read[0], to_write[1])]
        self.input, self.output = to_read[1], to_write[0]
        for fd in (to_read[0], to_write[1]):
            os.close(fd)
        # Chromium reads commands from descriptor 3 and answers on 4
        start = (
            "import os, sys; [os.dup2(int(sys.argv[i]), i + 2) for i in (1, 2)]; os.execv(sys.argv[3], sys.argv[3:])"
        )
        command = [sys.executable, "-c", start, *map(str, theirs), str(CHROMIUM), *FLAGS]
        command += [f"--user-data-dir={home}", "about:blank"]
        quiet = subprocess.DEVNULL
        self.process = subprocess.Popen(command, pass_fds=theirs, stdin=quiet, stdout=quiet, stderr=quiet)
        for fd in theirs:
            os.close(fd)
        self.buffer, self.number, self.session, self.url = b"", 0, None, ""
        self.events: list[dict] = []
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self.session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for part in ("Page", "Runtime", "Log", "Network"):
            self(f"{part}.enable")

    def __call__(self, command: str, **words) -> dict:
        """The answer to one command."""
        self.number += 1
        message = {"id": self.number, "method": command, "params": words}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.input, json.dumps(message).encode() + b"\0")
        while True:
            found = self._next()
            if found.get("id") == self.number:
                assert "error" not in found, f"{command}: {found.get('error')}"
                return found["result"]

    def open(self, path, width: int, height: int = 900) -> None:
        """Load a file in a window of so many pixels; waits for its load event."""
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.events.clear()
        self.url = path.as_uri()
        self("Page.navigate", url=self.url)
        while not any(one["method"] == "Page.loadEventFired" for one in self.events):
            self._next()

    def run(self, script: str):
        """The value of a JavaScript expression, promises awaited."""
        found = self("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def complaints(self) -> list[str]:
        """Exceptions, and errors and warnings on the console, since the last page was opened."""
        found = []
        for event in self.events:
            words = event["params"]
            if event["method"] == "Runtime.exceptionThrown":
                details = words["exceptionDetails"]
                found.append(str(details.get("exception", details).get("description", details["text"])))
            elif event["method"] == "Runtime.consoleAPICalled" and words["type"] in ("error", "warning", "assert"):
                found.append(" ".join(str(arg.get("value")) for arg in words["args"]))
            elif event["method"] == "Log.entryAdded" and words["entry"]["level"] in ("error", "warning"):
                found.append(words["entry"]["text"] + " " + words["entry"].get("url", "")[:80])
        return found

    def requests(self) -> list[str]:
        """What was asked for beside the page itself and the data in it."""
        asked = [e["params"]["request"]["url"] for e in self.events if e["method"] == "Network.requestWillBeSent"]
        return [url for url in asked if url != self.url and not url.startswith("data:")]

    def close(self) -> None:
        """End this browser, and only this one."""
        try:
            self.session = None
            self("Browser.close")
            self.process.wait(10)
        except (AssertionError, OSError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()
        os.close(self.input)
        os.close(self.output)

    def _next(self) -> dict:
        until = time.monotonic() + PATIENCE
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.output], [], [], max(0, until - time.monotonic()))
            assert ready, f"chromium said nothing for {PATIENCE} s"
            more = os.read(self.output, 1 << 20)
            assert more, "chromium has gone"
            self.buffer += more
        line, self.buffer = self.buffer.split(b"\0", 1)
        found = json.loads(line)
        if "method" in found:
            self.events.append(found)
        return found


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    started = Browser(tmp_path_factory.mktemp("chromium"))
    yield started
    started.close()


def sheets(credit="Ann, CC BY 4.0, https://example.org/cat"):
    """Three photographs, three methods, the layers of MAPS; no two pictures alike."""
    found = []
    for place, name in enumerate(PHOTOS):
        random = np.random.default_rng(place)
        photo = np.kron(random.integers(0, 256, (4, 4, 3)), np.ones((24, 24, 1))).astype(np.uint8)
        images = []
        for at, method in enumerate(METHODS):
            for layer in MAPS[at]:
                owner = fake_owner(100 * place + 20 * at + layer + 1, 6, 6)
                images.append((method, layer, 20.0, overlay.draw(photo, owner, (6, 6))))
        found.append(view.Sheet(name, credit, "tabby", images, photo, f"lost by {3 - place} of 3 methods"))
    return found


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    return view.html(fake_rows(), sheets(), tmp_path_factory.mktemp("page") / "report.html")


LOOK = """(async () => {
  const shown = (one) => one.getClientRects().length > 0;
  const size = (one) => { const box = one.getBoundingClientRect(); return Math.min(box.width, box.height); };
  const loaded = async (image) => {
    image.scrollIntoView();
    for (let i = 0; i < 200 && !image.complete; i++) await new Promise((done) => setTimeout(done, 10));
    return image.complete && image.naturalWidth > 0 && size(image) > 8;
  };
  const charts = [...document.querySelectorAll(".chart")].map((chart) => {
    const drawn = [...chart.querySelectorAll("svg")].filter(shown);
    return {drawn: drawn.length, size: Math.min(...drawn.map(size)), parts: drawn[0]?.querySelectorAll("*").length ?? 0};
  });
  const broken = [];
  const photographs = document.querySelectorAll(".pick select")[0];
  for (const option of photographs ? [...photographs.options] : [{value: null}]) {
    if (photographs) { photographs.value = option.value; photographs.dispatchEvent(new Event("change")); }
    for (const image of [...document.querySelectorAll("img")].filter(shown))
      if (!await loaded(image)) broken.push(image.alt || image.src.slice(0, 60));
  }
  document.querySelectorAll("details").forEach((one) => { one.open = true; });
  window.scrollTo(0, 0);
  const wide = [...document.querySelectorAll("body *")].filter((one) => shown(one) && !one.closest(".scroll, svg")
    && one.getBoundingClientRect().right > innerWidth + 0.5).map((one) => one.tagName + "." + one.className);
  return {charts, broken, images: document.images.length, width: innerWidth,
    content: document.documentElement.scrollWidth, wide};
})()"""

CHOOSE = """(() => {
  const [image, method, layer] = document.querySelectorAll(".pick select");
  const seen = [], drawn = (one) => one.getClientRects().length > 0;
  for (const i of image.options) for (const m of method.options) for (const l of layer.options) {
    image.value = i.value; method.value = m.value; layer.value = l.value;
    layer.dispatchEvent(new Event("change"));
    const shown = [...document.querySelectorAll(".sheet img")].filter(drawn);
    seen.push({image: i.text, method: m.text, layer: l.text, alts: shown.map((one) => one.alt),
      pictures: shown.map((one) => one.src), empty: [...document.querySelectorAll(".strip > p")].filter(drawn).length});
  }
  return seen;
})()"""


@needs_chromium
@pytest.mark.parametrize("width", [1280, 420])
def test_page_opens(browser, page, width):
    """No errors, every figure drawn, nothing wider than the window, nothing fetched."""
    browser.open(page, width)
    found = browser.run(LOOK)
    assert found["width"] == width
    assert len(found["charts"]) == 3, "accuracy against cost and against time at two batch sizes"
    for chart in found["charts"]:
        assert chart["drawn"] == 1 and chart["size"] > 100 and chart["parts"] > 50, chart
    assert found["images"] == len(PHOTOS) * (1 + sum(map(len, MAPS)))
    assert found["broken"] == []
    assert found["content"] <= width and found["wide"] == []
    assert browser.complaints() == []
    assert browser.requests() == []


LINK = "https://commons.wikimedia.org/wiki/File:European_shorthair_procumbent_cat_looking_upwards_from_a_wall.jpg"


@needs_chromium
def test_long_credits_break(browser, tmp_path):
    """A credit with a long link does not make the page wider than a phone."""
    browser.open(view.html(fake_rows()[:3], sheets(f"Ann, CC BY 4.0, {LINK}"), tmp_path / "report.html"), 420)
    found = browser.run(LOOK)
    assert found["content"] <= 420 and found["wide"] == []


@needs_chromium
def test_selectors_change_the_picture(browser, page):
    """Each choice shows that photograph's maps of that method as they stand after that layer, and no others."""
    browser.open(page, 1280)
    seen = browser.run(CHOOSE)
    layers = sorted({layer for maps in MAPS for layer in maps})
    assert len(seen) == len(PHOTOS) * (1 + len(METHODS)) * (1 + len(layers))
    assert [one["image"] for one in seen[:: len(seen) // 3]] == [
        f"{name} – tabby – lost by {3 - i} of 3 methods" for i, name in enumerate(PHOTOS)
    ]
    for one in seen:
        wanted, empty = [one["image"].split(" – ")[0]], 0
        for method, maps in zip(METHODS, MAPS):
            if one["method"] not in (method, "all methods"):
                continue
            before = layers[: 1 + [overlay.after(layer) for layer in layers].index(one["layer"])] if (
                one["layer"] != "overview") else []  # fmt: skip
            there = overlay.spaced(maps, 3) if one["layer"] == "overview" else [m for m in maps if m in before][-1:]
            wanted += [f"{method}, {overlay.after(layer)}: 20 tokens" for layer in there]
            empty += not there
        assert (one["alts"], one["empty"]) == (wanted, empty), one
    assert len({src for one in seen for src in one["pictures"]}) == len(PHOTOS) * (1 + sum(map(len, MAPS)))
    assert browser.complaints() == []


@needs_chromium
def test_columns_sort(browser, page):
    """A click on a column's head sorts its rows, another turns them round, a third brings the order back."""
    browser.open(page, 1280)
    names = "[...document.querySelectorAll('tbody tr')].map((row) => row.dataset.row)"
    orders = [browser.run(names)]
    for _ in range(3):
        browser.run("document.querySelector('thead button').click()")
        orders.append(browser.run(names))
    assert orders[3] == orders[0] != orders[1] and orders[1] != orders[2] != orders[0]
    assert all(sorted(order) == sorted(orders[0]) for order in orders)


@needs_chromium
def test_faults_are_seen(browser, page, tmp_path):
    """Planted: a script that throws, a broken image, one from elsewhere, a wide box, an empty chart, dead selectors."""
    text = page.read_text(encoding="utf-8")
    faults = """<img alt="broken" src="data:image/png;base64,AAAA"><img alt="remote" src="http://127.0.0.1:49151/x.png">
      <img alt="beside" src="beside.png">
      <div class="rigid" style="width: 900px">wide</div><div class="chart"><svg width="200" height="0"></svg></div>
      <script>console.error("planted by console"); throw new Error("planted by throw");</script></body>"""
    bad = tmp_path / "bad.html"
    bad.write_text(text.replace("</body>", faults), encoding="utf-8")
    browser.open(bad, 420)
    found, complaints = browser.run(LOOK), " ".join(browser.complaints())
    assert {"broken", "remote", "beside"} <= set(found["broken"])
    assert found["content"] > 420 and "DIV.rigid" in found["wide"]
    assert found["charts"][-1]["size"] == 0
    assert "planted by console" in complaints and "planted by throw" in complaints
    assert set(browser.requests()) == {"http://127.0.0.1:49151/x.png", bad.with_name("beside.png").as_uri()}
    dead = tmp_path / "dead.html"
    dead.write_text(text.replace("image.onchange = method.onchange = layer.onchange = show;", ""), encoding="utf-8")
    browser.open(dead, 1280)
    seen = browser.run(CHOOSE)
    assert len({tuple(one["pictures"]) for one in seen}) < len(seen)


def hit_rows(hits: dict[str | None, list[int]]) -> list[Row]:
    """Rows that differ in which images they get right."""
    first = fake_rows()[0]
    found = []
    for method, right in hits.items():
        accuracy = first.accuracy.model_copy(update={"hits": pack(np.array(right, bool))})
        role = "plain" if method is None else "method"
        found.append(first.model_copy(update={"method": method, "role": role, "accuracy": accuracy}))
    return found


def test_worst_drops_come_first():
    """Photographs are ordered by how many methods lose what the plain model gets right; what it gets wrong comes last."""
    rows = hit_rows({
        None: [1, 1, 1, 0, 1, 1],
        "ToMe(r=4)": [1, 1, 0, 0, 1, 0],
        "ToMe(r=8)": [1, 0, 0, 0, 1, 0],
        "TopK()": [1, 1, 1, 1, 1, 0],
    })  # fmt: skip
    lost = [f"lost by {how} of 3 methods" for how in (3, 2, 1, "none")]
    assert telling(rows, 6, 4) == ([5, 2, 1, 0], lost)
    assert telling(rows, 6, 6) == ([5, 2, 1, 0, 4, 3], [*lost, lost[-1], "the plain model is wrong too"])
    assert telling(rows[:1], 6, 2) == (overlay.spaced(range(6), 2), ["", ""]), "nothing to go by: evenly spaced"
    assert telling(rows[:1], 6, 0) == telling(rows, 6, 0) == ([], [])
    baseline = rows[1].model_copy(update={"method": "Grid()", "role": "baseline"})
    assert telling([*rows, baseline], 6, 6) == telling(rows, 6, 6), "baselines are not counted among methods"
    assert telling([rows[0], baseline], 6, 1) == ([2], ["lost by 1 of 1 baseline"])
