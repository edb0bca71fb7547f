"""Where the layers of a network stand in its picture: columns in the order of the data, and lanes beside each other.

A layer's column is one behind the last layer that it reads (``networkx.topological_generations``). In the lanes, a
chain goes straight on and branches lie beside it; an edge that passes columns has a lane to itself there, so that no
line goes through a layer it has nothing to do with. The page breaks the columns into rows that fit its window.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import networkx as nx


@dataclass(frozen=True, slots=True)
class Drawing:
    """A picture of a graph whose nodes are numbered from 0 on.

    Attributes:
        columns, lanes: of every node, from 0 on.
        passing: of edges that pass columns, the lane in which they do.
    """

    columns: tuple[int, ...]
    lanes: tuple[int, ...]
    passing: Mapping[tuple[int, int], int]


def draw(num_nodes: int, edges: Iterable[tuple[int, int]]) -> Drawing:
    """Return the picture of a graph without cycles whose edges go from lower to higher numbers."""
    graph: nx.DiGraph[int] = nx.DiGraph()
    graph.add_nodes_from(range(num_nodes))
    graph.add_edges_from(edges)
    columns = _columns(graph)
    taken: set[tuple[int, int]] = set()  # column and lane
    lanes: dict[int, int] = {}
    for node in sorted(graph, key=lambda n: (columns[n], n)):
        before = sorted(graph.predecessors(node), key=lambda n: (-columns[n], lanes[n]))
        wanted = lanes[before[0]] if before else 0
        lanes[node] = next(lane for lane in _near(wanted) if (columns[node], lane) not in taken)
        taken.add((columns[node], lanes[node]))
    passing: dict[tuple[int, int], int] = {}
    for a, b in sorted(graph.edges, key=lambda edge: (columns[edge[1]] - columns[edge[0]], edge)):
        between = range(columns[a] + 1, columns[b])
        if between:
            free = (x for x in _near(lanes[a]) if not any((column, x) in taken for column in between))
            passing[a, b] = next(free)
            taken.update((column, passing[a, b]) for column in between)
    return _from_zero(columns, [lanes[n] for n in range(num_nodes)], passing)


def _columns(graph: "nx.DiGraph[int]") -> list[int]:
    """Return the column of every node; what reads nothing stands right in front of its first reader."""
    found = [0] * len(graph)
    for column, nodes in enumerate(nx.topological_generations(graph)):
        for node in nodes:
            found[node] = column
    for node in graph:
        readers = [found[reader] for reader in graph.successors(node)]
        if readers and not graph.in_degree(node):
            found[node] = min(readers) - 1
    return found


def _near(lane: int) -> Iterator[int]:
    """Yield all lanes, the nearest first."""
    yield lane
    for distance in itertools.count(1):
        yield lane + distance
        yield lane - distance


def _from_zero(columns: Sequence[int], lanes: Sequence[int], passing: Mapping[tuple[int, int], int]) -> Drawing:
    first = min((*lanes, *passing.values()), default=0)
    return Drawing(
        tuple(columns), tuple(lane - first for lane in lanes), {edge: lane - first for edge, lane in passing.items()}
    )
