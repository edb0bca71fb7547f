"""The page of ``layerwise report`` in a real browser: what it shows, on a phone and on paper too, and by keys."""

import itertools
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from planner.plan import Plan
from planner.report.html import SCRIPTS, data, page
from support.browser import PHONE, Opened, chromium
from support.command_line import layerwise

if TYPE_CHECKING:
    from playwright.sync_api import Browser

EVIL = "</script><script>alert(1)</script>"
NETWORK = f"""
from collections import OrderedDict
from torch import nn


def net():
    return nn.Sequential(OrderedDict([
        ("conv1", nn.Conv2d(3, 8, 3, padding=1)), ("relu", nn.ReLU()), ({EVIL!r}, nn.Conv2d(8, 16, 3, padding=1)),
        ("pool", nn.AdaptiveAvgPool2d(1)), ("flat", nn.Flatten()), ("fc1", nn.Linear(16, 4096)),
        ("fc2", nn.Linear(4096, 10)),
    ]))
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of a network with a layer whose name is markup."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "net.py").write_text(NETWORK)
    plan, found = folder / "plan.json", folder / "report.html"
    model = (f"{folder}/net.py:net", "--input", "3,16,16", "--batch", "8")
    ran = layerwise("plan", *model, "--cluster", "2x2-a100-eth10", "--solver", "conv-data-fc-model", "-o", plan)
    assert ran.code == 0, ran.err
    ran = layerwise("report", plan, "--scale", "4,1", "-o", found)
    assert ran.code == 0, ran.err
    assert f"wrote {found}" in ran.err
    return found


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    with chromium() as found:
        yield found


@pytest.fixture
def opened(browser: "Browser", report: Path) -> Iterator[Opened]:
    found = Opened(browser, report)
    yield found
    assert found.logged == []
    assert found.asked == [report.as_uri()]  # nothing is fetched
    found.page.close()


def layers(opened: Opened) -> list[str]:
    return opened.page.locator("#layers tbody th").all_inner_texts()


@pytest.mark.browser
def test_everything_is_drawn(opened: Opened) -> None:
    sections = opened.page.locator("main > section:visible h2").all_inner_texts()
    assert sections == [
        "The plan", "Network", "Timeline of a step", "Memory over the step", "Communication between devices",
        "Strategies compared", "Scaling", "Accuracy of the prediction", "Where this comes from",
    ]  # fmt: skip
    assert opened.colours("graph") > 10
    assert opened.colours("time") > 10
    assert opened.colours("matrix") > 5
    assert opened.count("#memory-chart svg path") == 5
    assert opened.count("#strategies tr.strong") == 1
    assert opened.page.locator("#scaling tbody th").all_inner_texts() == ["1", "4"]
    assert "2x2-a100-eth10" in opened.text("#facts")
    assert "layerwise plan" in opened.text("#sources")


@pytest.mark.browser
def test_a_name_that_is_markup_stays_text(opened: Opened, report: Path) -> None:
    assert EVIL in layers(opened)
    assert opened.count("script") == 2
    assert "<script>alert" not in report.read_text()
    opened.page.get_by_role("button", name=EVIL).click()
    assert EVIL in opened.text("#details h3")


@pytest.mark.browser
def test_layers_are_filtered_and_sorted(opened: Opened) -> None:
    every = layers(opened)
    assert opened.text("#count") == f"{len(every)} of {len(every)} layers"
    opened.page.fill("#search", "FC2 out_channel")
    assert layers(opened) == ["fc2"]
    opened.page.fill("#search", "no such layer")
    assert (layers(opened), opened.text("#count")) == ([], f"0 of {len(every)} layers")
    opened.page.get_by_role("button", name="Clear").click()
    opened.page.select_option("#operator", "linear")
    assert layers(opened) == ["fc1", "fc2"]
    opened.page.check("#talks")
    opened.page.select_option("#operator", "")
    assert 0 < len(layers(opened)) < len(every)
    opened.page.get_by_role("button", name="Clear").click()
    head = opened.page.locator("#layers thead th", has_text="parameters")
    head.get_by_role("button").click()
    assert head.get_attribute("aria-sort") == "descending"
    assert layers(opened)[:2] == ["fc1", "fc2"]  # 16 x 4096 + 4096 and 4096 x 10 + 10
    head.get_by_role("button").click()
    assert layers(opened)[-1] == "fc1"
    opened.page.locator("#legend button").first.click()
    assert len(layers(opened)) < len(every)


@pytest.mark.browser
def test_all_of_it_can_be_used_by_keys(opened: Opened) -> None:
    page_ = opened.page
    page_.focus("#graph")
    first, second = layers(opened)[:2]
    page_.keyboard.press("ArrowRight")
    assert opened.text("#details h3") == first
    page_.keyboard.press("ArrowRight")
    assert opened.text("#details h3") == second
    page_.keyboard.press("Enter")
    assert page_.evaluate("document.activeElement.textContent") == second
    page_.focus("#graph")
    page_.keyboard.press("Escape")
    assert opened.text("#details h3") == "No layer selected"
    page_.focus("#time")
    page_.keyboard.press("ArrowRight")
    page_.keyboard.press("+")
    page_.keyboard.press("ArrowRight")
    assert re.search(r"predicted, every rank, compute: .* \(forward\), .* from .* to ", opened.text("#event"))
    page_.focus("#matrix")
    for _ in range(2):
        page_.keyboard.press("ArrowRight")
    assert re.match(r"node0.gpu0 → node0.gpu1: [\d.]+ [KM]iB", opened.text("#cell"))
    page_.focus("#memory-chart input")
    page_.keyboard.press("Home")
    assert opened.text("#memory-chart .readout").startswith("input forward, from 0 s")


@pytest.mark.browser
def test_it_fits_a_phone(browser: "Browser", report: Path) -> None:
    opened = Opened(browser, report, PHONE)
    assert opened.page.evaluate("document.documentElement.scrollWidth") == PHONE[0]
    assert opened.colours("graph") > 10
    sizes = opened.page.evaluate(
        "[...document.querySelectorAll('p, dd, td, th, button')].map(e => parseFloat(getComputedStyle(e).fontSize))"
    )
    assert min(sizes) >= 12
    assert opened.logged == []
    opened.page.close()


@pytest.mark.browser
def test_it_is_whole_on_paper(opened: Opened) -> None:
    opened.page.emulate_media(media="print")
    assert not opened.page.locator("nav").is_visible()
    assert not opened.page.locator("#filters").is_visible()
    clipped = """[...document.querySelectorAll(".scroll")].filter(e => e.scrollWidth > e.clientWidth + 1
        || getComputedStyle(e).overflowY !== "visible").length"""
    opened.page.set_viewport_size({"width": 720, "height": 1000})  # A4 without its margins
    assert opened.page.evaluate(clipped) == 0
    assert opened.page.pdf(format="A4").startswith(b"%PDF")


def test_the_curve_ends_with_the_strategies_of_the_plan(report: Path) -> None:
    found = re.search(r'id="data">(.*?)</script>', report.read_text())
    assert found is not None
    curve = json.loads(found[1])["scaling"]
    plan = Plan.load(report.with_name("plan.json"))
    (data_s,) = [baseline.step_s for baseline in plan.baselines if baseline.name == "data"]
    assert curve["devices"] == [1, 4]
    assert curve["data"][1] == pytest.approx(data_s, rel=1e-5)
    assert curve["planned"][1] <= min(data_s, plan.totals.step_s, curve["planned"][0]) * (1 + 1e-5)


def test_data_never_ends_its_element() -> None:
    text = page("<b>{{DATA}}</b>", {"a": "</script><!--", "b": ["&lt;", "\u2028"]})
    assert "<title>&lt;b&gt;{{DATA}}&lt;/b&gt;</title>" in text
    assert not set("<>&") & set(data({"a": "</script><!--", "b": "&"}))
    assert text.count("</script>") == 2


# What people with a missing kind of cone see, in linear light [Viénot, Brettel, Mollon, 1999], and with all of them.
SEEN_AS = {
    "all": np.eye(3),
    "protan": np.array([[0.11238, 0.88762, 0.0], [0.11238, 0.88762, 0.0], [0.00401, -0.00401, 1.0]]),
    "deutan": np.array([[0.29275, 0.70725, 0.0], [0.29275, 0.70725, 0.0], [-0.02234, 0.02234, 1.0]]),
}


def lab(colour: str, seen_as: str) -> np.ndarray:
    """Return a colour in CIE L*a*b* (D65)."""
    parts = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
    linear = np.clip(SEEN_AS[seen_as] @ linear, 0, 1)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = np.cbrt(np.maximum(to_xyz @ linear / [0.9505, 1.0, 1.089], 1e-6))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("seen_as", SEEN_AS)
def test_colours_are_told_apart_with_any_colour_vision(seen_as: str) -> None:
    folder = Path(page.__code__.co_filename).parent / "page"
    text = "".join((folder / name).read_text() for name in SCRIPTS)
    for name in ("PALETTE", "EVENT_COLOURS", "MEMORY_COLOURS"):
        listed = re.search(rf"const {name} = \[(.*?)\]", text)
        other = re.search(r"const OTHER = \"(.*?)\"", text)
        assert listed is not None
        assert other is not None
        colours = sorted({*re.findall(r"#[0-9a-f]{6}", listed[1]), other[1]})
        assert len(colours) >= 5
        for a, b in itertools.combinations(colours, 2):
            apart = float(np.linalg.norm(lab(a, seen_as) - lab(b, seen_as)))
            assert apart > 12, (name, a, b, apart)


@pytest.mark.browser
@pytest.mark.zoo
@pytest.mark.skipif(not os.environ.get("LAYERWISE_FULL"), reason="plans ResNet-152 on 64 devices: LAYERWISE_FULL=1")
def test_a_large_network_on_many_devices_stays_small(browser: "Browser", tmp_path: Path) -> None:
    plan, found = tmp_path / "plan.json", tmp_path / "report.html"
    machine = ("--cluster", "8x8-a100-ib100", "--batch", "2048")
    ran = layerwise("plan", "torchvision:resnet152", *machine, "--time-limit", "20s", "-o", plan)
    assert ran.code == 0, ran.err
    assert layerwise("report", plan, "-o", found).code == 0
    assert found.stat().st_size < 3e6
    opened = Opened(browser, found)
    assert opened.logged == []
    drawn_ms = opened.page.evaluate("performance.timing.domComplete - performance.timing.navigationStart")
    print(f"ResNet-152 on 64 devices: {found.stat().st_size / 1024:.0f} KiB, drawn after {drawn_ms} ms")
