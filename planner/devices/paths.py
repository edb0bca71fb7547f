"""Shortest paths of a machine: by climbing where it is a tree, by Dijkstra elsewhere."""

from collections.abc import Mapping, Sequence

import networkx
from networkx import Graph


class Paths:
    """Paths with the least latency between the ids of one machine.

    Ties go to fewer links (the edge weights see to that), then to the link that was named first.
    Paths are kept per source for the lifetime of the instance.

    Attributes:
        parents: of a tree, every id but the root with the id one step nearer to the root; empty
            where the machine is no tree.
    """

    def __init__(self, graph: "Graph[str]") -> None:
        self._graph = graph
        self._from: dict[str, Mapping[str, Sequence[str]]] = {}
        self.is_tree = networkx.is_tree(graph)
        self.parents: dict[str, str] = {}
        self._depth = dict.fromkeys(graph, 0)
        if self.is_tree:
            root = max(graph, key=lambda node: graph.degree[node])  # a switch: short climbs
            for node, parent in networkx.bfs_predecessors(graph, root):
                self.parents[node], self._depth[node] = parent, self._depth[parent] + 1

    def between(self, src: str, dst: str) -> Sequence[str]:
        """Return the ids from ``src`` to ``dst``, both included."""
        if self.is_tree:
            return self._climb(src, dst)
        if src not in self._from:
            self._from[src] = networkx.single_source_dijkstra_path(self._graph, src)
        return self._from[src][dst]

    def _climb(self, src: str, dst: str) -> Sequence[str]:
        up, down = [src], [dst]
        while up[-1] != down[-1]:
            side = up if self._depth[up[-1]] >= self._depth[down[-1]] else down
            side.append(self.parents[side[-1]])
        return up + down[-2::-1]
