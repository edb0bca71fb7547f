"""The ranks of a plan as threads of one process: the real lowered modules, without processes."""

import threading
from collections.abc import Callable
from typing import TypeVar

from torch import nn

from planner.frontend.lower import TracedModel
from planner.plan.schema import Plan
from runtime.comm.communicator import ThreadCommunicator, ThreadWorld
from runtime.module import ParallelModule
from runtime.parallel import lower, trace_for

T = TypeVar("T")


def run_ranks(
    build_net: Callable[[], nn.Module],
    plan: Plan,
    work: Callable[[ParallelModule, TracedModel, int], T],
    communicator: Callable[[ThreadWorld, int], ThreadCommunicator] = ThreadCommunicator,
) -> list[T]:
    """Call a function with the parallel module of every rank; the ranks are threads of this process.

    Args:
        build_net: the whole model; each rank gets one.
        plan: of the model.
        work: gets the module, the traced model and the position of the rank in the mesh.
        communicator: how ranks talk.
    """
    world = ThreadWorld(plan.mesh)
    models = [build_net() for _ in range(plan.mesh.size)]
    traces = [trace_for(model, plan) for model in models]  # fx patches modules globally while it traces
    results: dict[int, T] = {}
    errors: list[BaseException] = []

    def rank(position: int) -> None:
        try:
            net = lower(models[position], traces[position], plan, communicator(world, position))
            results[position] = work(net, traces[position], position)
        except BaseException as error:
            errors.append(error)
            world.abort()

    threads = [threading.Thread(target=rank, args=(position,)) for position in range(plan.mesh.size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [results[position] for position in range(plan.mesh.size)]
