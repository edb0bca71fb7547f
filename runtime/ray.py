"""Ranks on a Ray cluster: one actor each, in a placement group of one bundle for every rank.

The actor (``runtime.keeper``) starts the process that ``run_local`` would, in an environment as torchrun makes it.
"""

import importlib
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from planner.errors import RunError, UsageError
from runtime import keeper
from runtime.ended import Ended, results_of
from runtime.launch import INTERFACES, KEEP_MEMORY, JsonValue, Place, place_variables

ADDRESS: Final = "RAY_ADDRESS"
_PASSED_ON: Final = ("GLOO_", "NCCL_")  # variables of this process, by how their names begin
_TURN_S: Final = 1.0  # that an actor waits for its rank before it listens again
_SETTLE_S: Final = 1.0  # after the first failure: time for its cause to show up, when that is another rank
_TERMINATE_S: Final = 1.0
_CONNECT_S: Final = 10.0
_STORE_BYTES: Final = 100 * 2**20  # of a local Ray for its objects, of which there are hardly any


@dataclass(frozen=True, slots=True)
class OnRay:
    """What came back.

    Attributes:
        results: in rank order.
        is_here: whether all ranks ran on this machine.
    """

    results: list[JsonValue]
    is_here: bool


@dataclass(frozen=True, slots=True)
class _Spot:
    """Where Ray has put a rank."""

    actor: Any
    node: str
    address: str
    num_cpus: int


def run_on_ray(
    function: str,
    argument: JsonValue,
    *,
    num_ranks: int,
    timeout_s: float,
    address: str | None = None,
    apart: bool = False,
) -> OnRay:
    """Call a function in new processes on a Ray cluster; as ``runtime.launch.run_local`` does on this machine.

    Ranks on one machine lie beside each other, as torchrun numbers them. A rank gets a GPU where the cluster has one
    for each, and as many threads as its machine has of Ray's CPUs for every rank. Nothing is left on the cluster.

    Args:
        function: ``package.module:name``, importable on every machine.
        argument: goes to every rank, as JSON.
        num_ranks: number of processes.
        timeout_s: for the whole call.
        address: of a running cluster, ``host:port``; ``RAY_ADDRESS`` if left out. Without both, a Ray on this machine
            is started and shut down.
        apart: every rank on a machine of its own, where the cluster has as many; otherwise on as few as possible.

    Raises:
        UsageError: Ray is not installed, is not at this address, or has fewer CPUs than there are ranks.
        LayerwiseError: the class that a rank raised, without the attributes of that class.
        RunError: a rank raised something else, died, or was not done in time; Ray found no room in time.
    """
    ray = _ray()
    deadline_s = time.monotonic() + timeout_s
    with _connected(ray, address or os.environ.get(ADDRESS), num_ranks):
        with _placed(ray, num_ranks, apart, deadline_s) as spots:
            call = json.dumps({"function": function, "argument": argument, "timeout_s": timeout_s})
            _start(ray, spots, call)
            ended = _watch(ray, [spot.actor for spot in spots], deadline_s)
            late = set(range(num_ranks)) - set(ended)
            ended |= _stopped(ray, {rank: spots[rank].actor for rank in late})
        here = ray.get_runtime_context().get_node_id()
        results = results_of([ended[rank] for rank in range(num_ranks)], late, timeout_s)
        return OnRay(results, all(spot.node == here for spot in spots))


def _ray() -> Any:
    try:
        return importlib.import_module("ray")
    except ModuleNotFoundError as error:
        raise UsageError(f"running on Ray needs the package {error.name!r}: pip install 'layerwise[ray]'") from error


@contextmanager
def _connected(ray: Any, address: str | None, num_ranks: int) -> Iterator[None]:
    """Connect this process to a cluster, or start one on this machine; keep a connection that it has."""
    if ray.is_initialized():
        yield
        return
    quietly = {"log_to_driver": False, "logging_level": "error"}
    try:
        if address is None:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            num_cpus = max(num_ranks, len(os.sched_getaffinity(0)))
            size = {"num_cpus": num_cpus, "object_store_memory": _STORE_BYTES, "include_dashboard": False}
            ray.init(address="local", **size, **quietly)
        else:
            _refuse_unreachable(address)
            try:
                ray.init(address=address, **quietly)
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise UsageError(f"no Ray cluster at {address!r}: {error}") from error
        yield
    finally:
        ray.shutdown()


def _refuse_unreachable(address: str) -> None:
    """Refuse an address that nobody listens at: Ray itself would try for minutes.

    Raises:
        UsageError: with the address.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        return  # such as auto
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise UsageError(
            f"no Ray cluster at {address!r}: {error}. Give the address that `ray start --head` printed, as "
            f"--ray-address or in {ADDRESS}; without one, a Ray is started on this machine"
        ) from error


@contextmanager
def _placed(ray: Any, num_ranks: int, apart: bool, deadline_s: float) -> Iterator[list[_Spot]]:
    """Reserve room for the ranks and start an actor for each; at the end both are gone."""
    nodes = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
    there = ray.cluster_resources()
    num_cpus = int(there.get("CPU", 0))
    if num_cpus < num_ranks:
        raise UsageError(f"{num_ranks} ranks need a CPU each, and the Ray cluster has {num_cpus}: add machines to it")
    share = {"CPU": 1, "GPU": 1} if there.get("GPU", 0) >= num_ranks else {"CPU": 1}
    strategy = "STRICT_SPREAD" if apart and len(nodes) >= num_ranks else "PACK"
    group = ray.util.placement_group([share] * num_ranks, strategy=strategy)
    actors: list[Any] = []
    try:
        if not group.wait(max(deadline_s - time.monotonic(), 0)):
            raise RunError(
                f"the Ray cluster had no room for {num_ranks} ranks in time ({share} each, {strategy}): "
                "`ray status` shows what holds it"
            )
        by_value = importlib.import_module("ray.cloudpickle")
        by_value.register_pickle_by_value(keeper)
        for bundle in range(num_ranks):
            where = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(
                group, placement_group_bundle_index=bundle
            )
            asked = {"num_cpus": 1, "num_gpus": share.get("GPU", 0), "max_restarts": 0, "scheduling_strategy": where}
            actors.append(ray.remote(keeper.Keeper).options(**asked).remote())
        homes = ray.util.placement_group_table(group)["bundles_to_node_id"]
        spots = [_spot(actor, nodes[homes[bundle]]) for bundle, actor in enumerate(actors)]
        order = list(dict.fromkeys(spot.node for spot in spots))
        yield sorted(spots, key=lambda spot: order.index(spot.node))
    finally:
        _stopped(ray, dict(enumerate(actors)))
        for actor in actors:
            ray.kill(actor)
        ray.util.remove_placement_group(group)


def _spot(actor: Any, node: Mapping[str, Any]) -> _Spot:
    return _Spot(actor, node["NodeID"], node["NodeManagerAddress"], int(node["Resources"].get("CPU", 1)))


def _start(ray: Any, spots: Sequence[_Spot], call: str) -> None:
    """Start the rank of every actor."""
    devices = ray.get([spot.actor.devices.remote() for spot in spots])
    is_alone = len({spot.node for spot in spots}) == 1
    meeting = {
        "MASTER_ADDR": "127.0.0.1" if is_alone else spots[0].address,
        "MASTER_PORT": str(ray.get(spots[0].actor.free_port.remote())),
    }
    passed = {name: value for name, value in os.environ.items() if name.startswith(_PASSED_ON)}
    defaults = KEEP_MEMORY | (dict.fromkeys(INTERFACES, "lo") if is_alone else {})
    started = []
    for rank, spot in enumerate(spots):
        beside = [other for other, its in enumerate(spots) if its.node == spot.node]
        place = Place(rank, len(spots), rank - beside[0], len(beside))
        # all of the machine's, because NCCL wants to see the GPUs of its neighbours; LOCAL_RANK says which is its own
        visible = {"CUDA_VISIBLE_DEVICES": ",".join(devices[other] for other in beside)} if all(devices) else {}
        environment = passed | meeting | visible | place_variables(place, max(spot.num_cpus // len(beside), 1))
        started.append(spot.actor.start.remote(call, environment, defaults, str(Path.cwd())))
    ray.get(started)


def _watch(ray: Any, actors: Sequence[Any], deadline_s: float) -> dict[int, Ended]:
    """Wait until all are done, one has failed or time is up; return those that have ended."""
    waits = {actor.wait.remote(_TURN_S): rank for rank, actor in enumerate(actors)}
    ended: dict[int, Ended] = {}
    while waits and (left_s := deadline_s - time.monotonic()) > 0:
        for answer in ray.wait(list(waits), timeout=min(left_s, _TURN_S))[0]:
            rank = waits.pop(answer)
            found = _answer(ray, rank, answer)
            if found is None:
                waits[actors[rank].wait.remote(_TURN_S)] = rank
                continue
            ended[rank] = found
            if found.has_failed:
                deadline_s = min(deadline_s, time.monotonic() + _SETTLE_S)
    return ended


def _stopped(ray: Any, actors: Mapping[int, Any]) -> dict[int, Ended]:
    """Stop ranks that still run; return how they ended."""
    answers = {rank: actor.stop.remote(_TERMINATE_S) for rank, actor in actors.items()}
    found = {rank: _answer(ray, rank, answer) for rank, answer in answers.items()}
    return {rank: ended or Ended(rank, 1, {}, "") for rank, ended in found.items()}


def _answer(ray: Any, rank: int, answer: Any) -> Ended | None:
    """Return how a rank has ended, None if it runs on; an actor that is gone has failed."""
    try:
        found = ray.get(answer, timeout=_TURN_S + _TERMINATE_S + _CONNECT_S)
    except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as error:
        message = f"its Ray actor is gone: {str(error).strip()}"
        return Ended(rank, 1, {"error": RunError.__name__, "message": message}, "")
    return None if found is None else Ended(rank, *found)
