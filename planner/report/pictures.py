"""What the page of ``layerwise report`` draws, as JSON values: layers, their graph, timelines, memory and traffic.

Names are written once and referred to by their number; values of many things stand in one list each. All quantities
are in SI base units with six significant digits; times of events are whole nanoseconds.
"""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from planner.cost.model import LayerCost
from planner.cost.overlap import Event
from planner.cost.peak import Phase
from planner.cost.simulate import Timeline
from planner.cost.table import CostTable
from planner.cost.traffic import Traffic
from planner.ir.dimension import Dimension
from planner.ir.graph import Layer
from planner.ir.ops import Receive, Redistribute, describe
from planner.ir.split import LayerId, Split
from planner.ir.stages import SENT
from planner.report.drawing import draw
from planner.report.inspection import LETTERS, rows_of_layers
from planner.report.trace import threads
from planner.report.tracks import COMPUTE, SYNC, TRANSFER, WAITING

Json = dict[str, object]

MAX_EVENTS: Final = 40_000
"""Of all ranks of a measured timeline; further ranks are left out, and the page says so."""
_CODES: Final = {
    **LETTERS, Dimension.IN_CHANNEL_SCATTER: "S", Dimension.REPLICATE: "-", Dimension.BROADCAST: "B",
}  # fmt: skip
_OF_A_LAYER: Final = re.compile(
    r"(?P<layer>.+?)(:sent)?( transfer)? (forward|backward)|(sync|gather) (?P<reduced>.+?)( \([^()]*\))?"
)


@dataclass(frozen=True, slots=True)
class PricedStage:
    """A stage of a plan with its splits, priced; of several, for a micro-batch.

    Attributes:
        table: all costs of its layers.
        choice: position of every layer's split.
        timeline: as if it were alone.
    """

    table: CostTable
    choice: tuple[int, ...]
    timeline: Timeline

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers, in the order in which they run."""
        return self.table.space.graph.layers

    @property
    def splits(self) -> tuple[Split, ...]:
        """The split of every layer."""
        pairs = zip(self.layers, self.choice, strict=True)
        return tuple(self.table.space.splits[layer.id][c] for layer, c in pairs)

    @property
    def costs(self) -> tuple[LayerCost, ...]:
        """What every layer costs."""
        return tuple(costs[c] for costs, c in zip(self.table.layers, self.choice, strict=True))


def layers(stages: Sequence[PricedStage]) -> Json:
    """Return every layer of every stage: what it is, how it is split, what that costs."""
    counted = {(s, row.name): row for s, stage in enumerate(stages) for row in rows_of_layers(stage.table.space.graph)}
    rows = []
    for s, stage in enumerate(stages):
        for layer, split, cost, times in zip(
            stage.layers, stage.splits, stage.costs, stage.timeline.layers, strict=True
        ):
            row = counted.get((s, layer.id))
            rows.append({
                "id": layer.id, "op": describe(layer.op), "stage": s,
                "shape": "x".join(map(str, layer.output.shape)),
                "absorbed": ", ".join(describe(absorbed.op) for absorbed in layer.absorbed),
                "origin": layer.origin, "passes": isinstance(layer.op, Redistribute),
                "halo": "recomputed" if split.tiles else "overlapped" if times.overlaps_halo else "",
                "compute": _short(times.compute_s), "transfer": _short(times.transfer_s),
                "halo_s": _short(times.halo_s), "sync": _short(times.sync_s), "exposed": _short(times.exposed_s),
                "memory": cost.memory.resident, "params": row.num_params if row else 0,
                "flop": row.forward_flop + row.backward_flop if row else 0,
            })  # fmt: skip
    names = [_split_name(split) for stage in stages for split in stage.splits]
    weights: dict[tuple[str, str], float] = {}
    for name, times in zip(names, (x for stage in stages for x in stage.timeline.layers), strict=True):
        weights[name] = weights.get(name, 0.0) + times.compute_s
    order = sorted(weights, key=lambda name: -weights[name])
    return {
        **{key: [row[key] for row in rows] for key in rows[0]},
        "split": [order.index(name) for name in names],
        "splits": [{"name": name, "code": code} for name, code in order],
    }


def _split_name(split: Split) -> tuple[str, str]:
    """Return a split as text, and its code: a letter for each mesh axis."""
    return str(split), "".join(_CODES[dimension] for dimension in split.dimensions) or "1"


def graph(stages: Sequence[PricedStage], sent: Sequence[Sequence[float]] = ()) -> Json:
    """Return where layers stand in the picture of the network, and what goes from one to another.

    Args:
        stages: of the plan.
        sent: from each stage to the next one, bytes of the tensors in the order in which that receives them.
    """
    offsets = list(itertools.accumulate((len(stage.layers) for stage in stages), initial=0))
    edges: dict[tuple[int, int], tuple[float, float]] = {}
    for stage, offset in zip(stages, offsets, strict=False):
        for (i, j, _), edge in stage.table.edges.items():
            pair = stage.choice[i], stage.choice[j]
            seconds = float(edge.forward_s[pair] + edge.backward_s[pair])
            before = edges.get((offset + i, offset + j), (0.0, 0.0))
            edges[offset + i, offset + j] = before[0] + float(edge.num_bytes[pair]), before[1] + seconds
    for s, (one, other) in enumerate(itertools.pairwise(stages)):
        here = one.table.space.graph.index
        received = [(j, layer) for j, layer in enumerate(other.layers) if isinstance(layer.op, Receive)]
        for (j, layer), num_bytes in zip(received, sent[s], strict=True):
            edges[offsets[s] + here[LayerId(layer.id + SENT)], offsets[s + 1] + j] = (num_bytes, 0.0)
    found = draw(offsets[-1], edges)
    return {
        "columns": found.columns, "lanes": found.lanes,
        "edges": [
            [a, b, found.passing.get((a, b), -1), _short(num_bytes), _short(seconds)]
            for (a, b), (num_bytes, seconds) in sorted(edges.items())
        ],
    }  # fmt: skip


@dataclass
class Timelines:
    """Events of steps that are shown below each other, on one axis of time.

    Attributes:
        layers: their ids; an event that is named after one belongs to it.
    """

    layers: Sequence[str]
    _names: dict[str, int] = field(default_factory=dict)
    _steps: list[Json] = field(default_factory=list)

    def add(self, steps: Mapping[str, Sequence[Event]], note: str = "") -> None:
        """Add the tracks of a step, by rank."""
        for name, events in steps.items():
            streams = []
            for track, own in threads(events):
                values = (_values(event, self._names) for event in own)
                streams.append({"name": track, "events": list(itertools.chain.from_iterable(values))})
            length = max((round(event.stop_s * 1e9) for event in events), default=0)
            self._steps.append({"name": name, "note": note, "length": length, "streams": streams})

    def document(self) -> Json:
        """Return all of them."""
        index = {layer: i for i, layer in reversed(list(enumerate(self.layers)))}
        return {
            "names": list(self._names),
            "layers": [index.get(layer_of(name), -1) for name in self._names],
            "steps": self._steps,
        }


def _values(event: Event, names: dict[str, int]) -> tuple[int, int, int, int]:
    start_ns, stop_ns = round(event.start_s * 1e9), round(event.stop_s * 1e9)
    return names.setdefault(event.name, len(names)), kind_of(event), start_ns, stop_ns - start_ns


def layer_of(name: str) -> str:
    """Return the layer that an event is named after, if it is."""
    found = _OF_A_LAYER.fullmatch(name)
    return name if found is None else found["layer"] or found["reduced"]


KINDS: Final = ("forward", "backward", "waiting", "behind computation", "update", "other")
"""Of events, in the order of their numbers."""


def kind_of(event: Event) -> int:
    """Return what an event is, a position in ``KINDS``."""
    if event.stream.startswith(SYNC):
        return KINDS.index("behind computation")
    if event.stream in {TRANSFER, WAITING}:
        return KINDS.index("waiting")
    if event.stream != COMPUTE:
        return KINDS.index("other")
    if "optimizer" in event.name.split():
        return KINDS.index("update")
    return next((k for k, kind in enumerate(KINDS[:2]) if kind in event.name.split()), KINDS.index("other"))


def within(ranks: Mapping[str, Sequence[Event]]) -> dict[str, Sequence[Event]]:
    """Return the ranks of a measured step that are shown: as many as ``MAX_EVENTS`` leaves room for."""
    counts = itertools.accumulate(len(events) for events in ranks.values())
    kept = [name for name, count in zip(ranks, counts, strict=True) if count <= MAX_EVENTS]
    return {name: ranks[name] for name in kept or list(ranks)[:1]}


def memory(timeline: Timeline, limit_bytes: int) -> Json:
    """Return what the busiest device holds over the step, from moment to moment."""
    starts: dict[str, float] = {}
    for event in timeline.events:
        if event.stream.endswith("compute"):
            starts.setdefault(event.name, event.start_s)
    rows, now_s = [], 0.0
    for moment in timeline.memory.moments:
        name = moment.name if moment.phase is Phase.UPDATE else f"{moment.name} {moment.phase}"
        now_s = max(now_s, starts.get(name, now_s))
        rows.append([
            round(now_s * 1e9), moment.parameters, moment.state, moment.gradients, moment.activations, moment.working
        ])  # fmt: skip
    return {
        "names": [
            m.name if m.phase is Phase.UPDATE else f"{m.name} {m.phase}" for m in timeline.memory.moments
        ],
        "parts": ["parameters", "optimizer state", "gradients", "activations", "working"],
        "moments": rows, "length": round(timeline.step_s * 1e9), "limit": limit_bytes,
        "bound": timeline.memory_bytes,
    }  # fmt: skip


def positions(num_bytes: Sequence[int], limit_bytes: int) -> Json:
    """Return the most that every position of a pipeline holds."""
    return {"positions": list(num_bytes), "limit": limit_bytes}


def traffic(devices: Sequence[str], causes: Traffic) -> Json:
    """Return what every device sends to every other one: rows are senders."""
    return {
        "devices": list(devices),
        "causes": [{"name": name, "bytes": rows.round().astype(int).tolist()} for name, rows in causes.items()],
    }


def short(values: Iterable[float]) -> list[float]:
    """Return numbers with six significant digits."""
    return [_short(x) for x in values]


def _short(value: float) -> float:
    return float(f"{value:.6g}")
