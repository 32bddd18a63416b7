"""The HTML report: escaped, self-contained, and, where there is a Chromium, run and looked at."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import torch
from torch import Tensor, nn

import fxzip
from fxzip import Frontier, InputError
from fxzip.frontier import Point
from fxzip.html import page, write
from fxzip.report import Report, Size

torch.set_num_threads(1)
EVIL = "<script>alert(1)</script>"
CHROMIUM = next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")


class Net(nn.Module):
    """A residual block in a module whose name is markup."""

    def __init__(self, classes: int):
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.add_module(EVIL, nn.Sequential(nn.Conv2d(8, 12, 1), nn.ReLU(), nn.Conv2d(12, 8, 1)))
        self.head = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        return self.head(torch.relu(x + getattr(self, EVIL)(x)).mean((2, 3)))


def merged(method: str = "solve", names: tuple[str, str] = ("a", "b"), **options):
    models = {}
    for seed, name in enumerate(names):
        torch.manual_seed(seed)
        models[name] = Net(2 + seed).eval()
    batches = [torch.randn(32, 1, 6, 6, generator=torch.Generator().manual_seed(k)) for k in range(2)]
    return fxzip.merge(models, batches, method=method, calibration=64, progress=False, **options)


@pytest.fixture(scope="module")
def zipped():
    return merged()


@pytest.fixture(scope="module")
def file(zipped, tmp_path_factory):
    points = tuple(Point(n, c, 10, (1 - c / 2,)) for n, c in (("1x", 1.0), (EVIL, 2.0)))
    found = Frontier(points, ("a",))
    return write(
        zipped, tmp_path_factory.mktemp("report") / "report.html", frontier=found,
        title=EVIL, measured={"merged": {"accuracy": 91.25}, "average": {EVIL: 12.0}},
    )  # fmt: skip


class Tags(HTMLParser):
    """Start tags with attributes, and the text of scripts."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


def embedded(text: str) -> dict:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    assert found
    return json.loads(found[1])


def test_every_name_is_escaped(file):
    text = file.read_text()
    assert "alert(1)" in text and EVIL not in text
    assert [t for t, _ in Tags(text).tags].count("script") == 5  # data, three libraries, ours
    names = [p for s in embedded(text)["spaces"] for p in s["tied"]]
    assert any(EVIL in n for n in names), "the data are kept as they are, behind \\u003c"


def test_nothing_is_fetched(file):
    tags = Tags(file.read_text()).tags
    assert not [a for t, a in tags if a.keys() & {"src"} or (t == "link") or a.get("href", "#")[0] != "#"]
    assert any("default-src 'none'" in a.get("content", "") for _, a in tags)
    assert file.stat().st_size < 1_000_000


def test_summary_spaces_and_fits_are_there(file, zipped):
    text, report = file.read_text(), fxzip.report(zipped)
    found = embedded(text)
    assert [n["name"] for n in found["nodes"]] == [n.name for n in report.nodes]
    assert {n["state"] for n in found["nodes"]} == {"merged", "per model"}
    assert all(len(s["own"]["values"]) and s["matched"]["side"] <= 48 for s in found["spaces"])
    assert all(row["after"] <= row["before"] + 1e-9 for row in found["layers"]) and len(found["layers"]) == 5
    assert "91.25" in text and "sound:" in text and "ensemble" in text and report.versions["torch"] in text


def test_private_nodes_have_their_own_model_and_size(zipped):
    heads = {n.task: n.type for n in fxzip.report(zipped).nodes if n.state == "per model"}
    assert heads == {"a": "[1, 2]", "b": "[1, 3]"}


def test_types_have_the_widths_of_a_budget():
    report = fxzip.report(merged("zip", budget=1.5))
    wider = {s.name: s.width for s in report.spaces if s.width != s.width_in[0]}
    assert wider and all(f"{s}:{wider[s]}," in n.type for n in report.nodes for s in n.spaces if s in wider)


def test_a_loaded_network_has_the_same_page(zipped, tmp_path):
    fxzip.save(zipped, tmp_path)
    again = fxzip.load(tmp_path, lambda task: Net(2 if task == "a" else 3))
    assert page(again) == page(fxzip.report(zipped).with_(seconds={}))  # times are not saved

    def calls(network) -> list[str]:
        return [line for line in fxzip.readable(network).splitlines() if " = call_" in line]

    assert calls(again) == calls(zipped) and all(" : [1, " in line for line in calls(again))


def test_sections_that_are_missing_say_so():
    bare = Report("zip", ("a", "b"), (Size("a", 10, 20), Size("b", 10, 20)), Size("merged", 12, 22), 0.5)
    text = page(bare)
    for words in ("settings of this merge were not kept", "No space was merged", "not run: merge(verify=False)"):
        assert words in text
    weights = fxzip.report(merged("rebasin"))
    assert all(s.matched is None for s in weights.spaces) and not weights.layers and page(weights)


@pytest.mark.parametrize("measured", [{"merged": 3}, [1], {"merged": {"accuracy": "high"}}], ids=str)
def test_figures_must_be_numbers(zipped, measured):
    with pytest.raises(InputError, match="dict of dicts of numbers"):
        page(zipped, measured=measured)


def test_a_file_that_cannot_be_written(zipped, tmp_path):
    with pytest.raises(InputError, match="cannot be written"):
        write(zipped, tmp_path / "no" / "such" / "folder.html")


def opened(file, hash: str = "") -> dict[str, str]:
    """Attributes of <html> after the page has run in Chromium."""
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=4000", "--dump-dom",
        f"file://{file}{hash}",
    ]  # fmt: skip
    text = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    return dict(next(a for t, a in Tags(text).tags if t == "html"), text=text)


@needs_chromium
def test_the_page_runs(file, zipped):
    found = opened(file, "#space=s0")
    assert found.get("data-ready") == "true" and "data-error" not in found
    assert found["data-selected"] == "space=s0" and int(found["data-lit"]) >= 4
    space = fxzip.report(zipped).spaces[0]
    assert f"{len(space.tied)} tied axes" in found["text"] and "alert(1)&lt;/script&gt;" in found["text"]


@needs_chromium
def test_a_page_without_anything_runs(tmp_path):
    bare = Report("zip", ("a",), (Size("a", 10),), Size("merged", 10), 1.0)
    found = opened(write(bare, tmp_path / "bare.html"))
    assert found.get("data-ready") == "true" and "data-error" not in found
    assert "before fxzip kept the graph" in found["text"]


@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_clicks_and_keys_on_a_narrow_screen(file, scheme):
    api = pytest.importorskip("playwright.sync_api", reason="pip install playwright drives the Chromium")
    with api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 400, "height": 800}, color_scheme=scheme)
        said: list[str] = []
        tab.on("console", lambda m: said.append(m.text))
        tab.on("pageerror", lambda e: said.append(str(e)))
        tab.on("dialog", lambda d: said.append(d.message))
        tab.goto(f"file://{file}")
        tab.wait_for_function("document.documentElement.dataset.ready")
        selected = "document.documentElement.dataset.selected"
        assert tab.evaluate("document.documentElement.scrollWidth") <= 400
        tab.click('[data-space="s1"]')
        tab.wait_for_function(f"{selected} === 'space=s1'")
        assert tab.locator("#panel canvas").count() == 3
        tab.focus("#graph")
        tab.keyboard.press("Escape")
        assert tab.evaluate(selected) == ""
        for key in ("ArrowDown", "ArrowDown"):
            tab.keyboard.press(key)
        assert tab.evaluate(selected) == "node=stem"
        tab.keyboard.press(" ")
        assert tab.evaluate(selected) == "space=s0"
        before = tab.evaluate("graph.cy.nodes().length")
        tab.click("#collapse")
        assert tab.evaluate("graph.cy.nodes().length") < before
        tab.fill("#find", "head_a")
        tab.press("#find", "Enter")
        assert tab.evaluate(selected) == "node=head_a"
        tab.click("#theme")
        assert not said
        browser.close()
