"""What notebooks show: the figures, every name escaped, nothing but plain tables."""

import re
from html.parser import HTMLParser

import torch
from torch import nn

from planner import html
from planner.api import compare, layer_graph
from planner.search.fixed import FIXED
from support.plans import document, plan_of

EVIL = '<script>alert("1")</script>&'


class Reader(HTMLParser):
    """Collects tags and texts; fails where tags are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.cells: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: object) -> None:  # noqa: ARG002  # the signature is the base's
        self.open.append(tag)
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.cells.append(data)


def test_every_text_is_escaped_and_comes_back_as_it_was() -> None:
    shown = html.titled(EVIL, html.table((EVIL, "b"), [(EVIL, EVIL)]), html.sentence(EVIL), html.folded(EVIL, ""))
    found = Reader(shown)
    assert "script" not in found.tags
    assert found.cells == [EVIL, EVIL, "b", EVIL, EVIL, EVIL, EVIL]


def test_a_plan_shows_its_promise_and_runs_of_equal_splits() -> None:
    data = document()
    data["model"]["name"] = data["stages"][0]["layers"][1]["id"] = EVIL
    found = Reader(plan_of(data)._repr_html_())
    assert "script" not in found.tags
    assert f"Plan of {EVIL}" in found.cells
    assert "4 ms, 2k samples/s" in found.cells
    assert "3 MiB of 4 MiB" in found.cells
    at = found.cells.index(EVIL)
    assert found.cells[at : at + 4] == [EVIL, "fc2", "2", "gpu=out_channel"]


def test_a_comparison_shows_every_strategy_and_the_bound_and_a_graph_every_layer() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 8))
    compared = compare(model, (torch.empty(8, 3, 8, 8, device="meta"),), devices=2)
    found = Reader(compared._repr_html_())
    assert {*FIXED, "planned (auto)"} <= set(found.cells)
    assert any(cell.startswith("Bound: ") for cell in found.cells)
    graph = layer_graph(compared.plans()[-1], model)
    shown = Reader(graph._repr_html_())
    assert {layer.id for layer in graph.layers} <= set(shown.cells)
    assert len(re.findall("<tr>", graph._repr_html_())) == len(graph.layers) + 1
    assert found.tags | shown.tags <= {
        "div",
        "b",
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
        "p",
        "details",
        "summary",
    }
