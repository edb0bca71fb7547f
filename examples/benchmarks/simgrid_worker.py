"""Runs collectives in SimGrid as the messages of their algorithms; started by ``simgrid_validation.py``.

For the system's interpreter, whose SimGrid it imports; it imports nothing of ours. Reads a job from
standard input and writes the simulated seconds of its cases to standard output, both JSON.

Every rank is an actor. A step of its program starts some messages, waits until they have arrived, and
then waits for the messages of others: no barrier, so ranks run ahead of each other where the
algorithm lets them. A message that takes several paths is one transfer on each, all at once, between
hosts that stand for the same device and differ in their routes. Steps and trees are written here
again, from the papers, so that an error in the planner's formulas cannot hide.
"""

import json
import sys
from collections import defaultdict

from simgrid import Actor, Comm, Engine, Host, LinkInRoute, NetZone, Semaphore


def ring(members, size, rounds):
    """Every member sends so many times to the next one and receives from the one before."""
    count = len(members)
    return {
        me: [([(members[(i + 1) % count], size)], [members[i - 1]])] * rounds for i, me in enumerate(members)
    }  # fmt: skip


def all_gather(members, num_bytes, _):
    return ring(members, num_bytes / len(members), len(members) - 1)


def all_reduce_ring(members, num_bytes, _):
    return ring(members, num_bytes / len(members), 2 * (len(members) - 1))


def all_to_all(members, num_bytes, _):
    """Everybody sends to everybody at once, beginning with the next one."""
    count = len(members)
    program = {}
    for i, me in enumerate(members):
        others = members[i + 1 :] + members[:i]
        program[me] = [([(other, num_bytes / (count - 1)) for other in others], others)]
    return program


def halo(members, num_bytes, _):
    near = {me: members[max(i - 1, 0) : i] + members[i + 1 : i + 2] for i, me in enumerate(members)}
    return {me: [([(other, num_bytes) for other in others], others)] for me, others in near.items()}


def broadcast(members, num_bytes, _):
    """A binomial tree: who has the data sends it over ever shorter distances."""
    program = defaultdict(list)
    distance = 1 << (len(members) - 1).bit_length() - 1
    while distance:
        for i in range(0, len(members) - distance, 2 * distance):
            program[members[i]].append(([(members[i + distance], num_bytes)], []))
            program[members[i + distance]].append(([], [members[i]]))
        distance //= 2
    return program


def all_reduce_halving(members, num_bytes, _):
    """Powers of two only: halves of what is left to ever more distant partners, then back."""
    program = defaultdict(list)
    for i, me in enumerate(members):
        distance, size, there = 1, num_bytes, []
        while distance < len(members):
            size /= 2
            there.append(([(members[i ^ distance], size)], [members[i ^ distance]]))
            distance *= 2
        program[me] = there + there[::-1]
    return program


def all_reduce_levels(members, num_bytes, inner):
    """Scatter inside consecutive parts, all-reduce between them, gather inside; all of it in rings."""
    program = defaultdict(list)
    parts = [members[i : i + inner] for i in range(0, len(members), inner)]
    across = list(zip(*parts, strict=True))
    for groups, algorithm, size in (
        (parts, all_gather, num_bytes),
        (across, all_reduce_ring, num_bytes / inner),
        (parts, all_gather, num_bytes),
    ):
        for group in groups:
            for me, steps in algorithm(list(group), size, None).items():
                program[me] += steps
    return program


SCHEDULES = {
    "all_gather": all_gather,
    "reduce_scatter": all_gather,  # the same messages in the opposite order
    "all_reduce_ring": all_reduce_ring,
    "all_reduce_levels": all_reduce_levels,
    "all_reduce_halving": all_reduce_halving,
    "all_to_all": all_to_all,
    "halo": halo,
    "broadcast": broadcast,
}


def tree_edges(root, count):
    """Edges (child, parent) of a binary tree over consecutive ranks, whose root has one child."""
    if count < 2:
        return []
    half = 1 << (count - 1).bit_length() - 1
    child = root + half
    return [(child, root), *full_tree(child, half), *tree_edges(child, count - half)]


def full_tree(top, half):
    """The left part of a node in rank order: as many ranks as make a complete tree."""
    if half < 2:
        return []
    child = top - half // 2
    right = [(a + half // 2, b + half // 2) for a, b in full_tree(child, half // 2)]
    right = [(a, child if b == child + half // 2 else b) for a, b in right]
    return [(child, top), *full_tree(child, half // 2), *right]


class Machine:
    """The platform of a job, with the hosts of every device and the routes of every pair."""

    def __init__(self, job):
        zone = NetZone.create_full_zone("machine")
        num_ways = max(len(ways) for ways in job["ways"].values())
        self.hosts = {d: [zone.create_host(f"{d}/{i}", 1e9) for i in range(num_ways)] for d in job["devices"]}
        self.shares = {}
        links = [self._link(zone, *link) for link in job["links"]]
        for pair, ways in job["ways"].items():
            src, dst = pair.split("|")
            self.shares[src, dst] = [share for share, _ in ways]
            for index, (_, hops) in enumerate(ways):
                route = [links[link][direction] for link, direction in hops]
                ends = (self.hosts[end][index].netpoint for end in (src, dst))
                zone.add_route(*ends, None, None, route, False)
        zone.seal()

    @staticmethod
    def _link(zone, name, bandwidth, latency, duplex):
        """Return the link as a route takes it, in both directions."""
        if duplex == "half":
            link = zone.create_link(name, bandwidth).set_latency(latency).seal()
            return LinkInRoute(link), LinkInRoute(link)
        link = zone.create_split_duplex_link(name, bandwidth).set_latency(latency).seal()
        return LinkInRoute(link, LinkInRoute.UP), LinkInRoute(link, LinkInRoute.DOWN)

    def transfer(self, src, dst, size):
        """Start a message; returns its transfers."""
        ways = zip(self.hosts[src], self.hosts[dst], self.shares[src, dst], strict=False)
        return [Comm.sendto_async(a, b, max(1, round(size * share))) for a, b, share in ways]


def run_steps(machine, program):
    """Start an actor for every rank of a program of steps; returns the actors."""
    arrived = defaultdict(lambda: Semaphore(0))

    def rank(me, steps):
        for sends, sources in steps:
            comms = [machine.transfer(me, to, size) for to, size in sends]
            for (to, _), transfers in zip(sends, comms, strict=True):
                Comm.wait_all(transfers)
                arrived[me, to].release()
            for source in sources:
                arrived[source, me].acquire()

    return [Actor.create(me, machine.hosts[me][0], rank, me, steps) for me, steps in program.items()]


def run_trees(machine, members, num_bytes, chunks):
    """Start the actors of two trees, each for half of the data; returns them."""
    count = len(members)
    first = tree_edges(0, count)
    if count % 2:
        second = [((a + 1) % count, (b + 1) % count) for a, b in first]
    else:
        second = [(count - 1 - a, count - 1 - b) for a, b in first]
    trees = [Tree(machine, members, edges, num_bytes / 2 / chunks) for edges in (first, second)]
    return [actor for tree in trees for actor in tree.start(chunks)]


class Tree:
    """Chunks that climb a tree and come down again: an actor for each direction of every edge."""

    def __init__(self, machine, members, edges, size):
        self.machine, self.members, self.edges, self.size = machine, members, edges, size
        self.arrived = defaultdict(lambda: Semaphore(0))  # by direction and lower end of an edge
        self.children = defaultdict(list)
        for child, parent in edges:
            self.children[parent].append(child)
        (self.root,) = {parent for _, parent in edges} - {child for child, _ in edges}

    def start(self, chunks):
        host = self.machine.hosts[self.members[self.root]][0]
        actors = [Actor.create("turn", host, self.turn, chunks)]
        for edge in self.edges:
            actors += (
                Actor.create(name, host, call, chunks, *edge) for name, call in (("up", self.up), ("down", self.down))
            )
        return actors

    def send(self, src, dst):
        Comm.wait_all(self.machine.transfer(self.members[src], self.members[dst], self.size))

    def up(self, chunks, child, parent):
        for _ in range(chunks):
            for below in self.children[child]:
                self.arrived["up", below].acquire()
            self.send(child, parent)
            self.arrived["up", child].release()

    def turn(self, chunks):
        for _ in range(chunks):
            for below in self.children[self.root]:
                self.arrived["up", below].acquire()
            for below in self.children[self.root]:
                self.arrived["down", below].release()

    def down(self, chunks, child, parent):
        for _ in range(chunks):
            self.arrived["down", child].acquire()
            self.send(parent, child)
            for below in self.children[child]:
                self.arrived["down", below].release()


def main():
    job = json.load(sys.stdin)
    engine = Engine(["simgrid", "--log=root.thres:error", *(f"--cfg={setting}" for setting in job["settings"])])
    machine = Machine(job)
    seconds = []

    def conductor():
        for case in job["cases"]:
            start = Engine.clock
            actors = []
            for members in case["groups"]:
                if case["collective"] == "all_reduce_tree":
                    actors += run_trees(machine, members, case["bytes"], case["chunks"])
                else:
                    schedule = SCHEDULES[case["collective"]]
                    actors += run_steps(machine, schedule(members, case["bytes"], case["inner"]))
            for actor in actors:
                actor.join()
            seconds.append(Engine.clock - start)

    Actor.create("conductor", Host.by_name(f"{job['devices'][0]}/0"), conductor)
    engine.run()
    json.dump(seconds, sys.stdout)


if __name__ == "__main__":
    main()
