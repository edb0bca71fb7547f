"""torch.distributed with the ranks as threads of this process: torch's own test backend, for what needs its meshes."""

import threading
from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist
from torch._C import _distributed_c10d
from torch._C._distributed_c10d import HashStore
from torch.testing._internal.distributed.multi_threaded_pg import _install_threaded_pg, _uninstall_threaded_pg

T = TypeVar("T")
_set_isolation: Callable[[bool], None] = getattr(_distributed_c10d, "_set_thread_isolation_mode")  # noqa: B009  # no stub


def on_threads(num_ranks: int, work: Callable[[int], T]) -> list[T]:
    """Call a function on every rank, with a process group of them all; return the results in rank order."""
    _set_isolation(True)
    _install_threaded_pg()
    store, results, errors = HashStore(), dict[int, T](), list[BaseException]()

    def rank(index: int) -> None:
        try:
            dist.init_process_group("threaded", rank=index, world_size=num_ranks, store=store)
            results[index] = work(index)
            dist.destroy_process_group()
        except BaseException as error:
            errors.append(error)
            raise

    threads = [threading.Thread(target=rank, args=(index,)) for index in range(num_ranks)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
    finally:
        _uninstall_threaded_pg()
        _set_isolation(False)
    if errors:
        raise errors[0]
    return [results[index] for index in range(num_ranks)]
