"""Faults during training on gloo processes, for ``faults``: each returns what went against the promise, or nothing.

The promise: every other rank ends by itself with an error that names the rank, the layer and the collective, within the
timeout; no process is left; the last complete checkpoint loads, and the run that goes on from it ends with the bits of
one that was never interrupted.
"""

import atexit
import dataclasses
import functools
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from examples.benchmarks import soak
from examples.benchmarks.fault_ranks import HUNG, Left, Ranks
from examples.benchmarks.fault_training import CHECKPOINT, FINAL, Fault, Job
from examples.benchmarks.faults import Case, Tally
from examples.benchmarks.rows import write_rows
from planner.errors import UsageError

TRAINING: Final = "examples.benchmarks.fault_training"
STEPS: Final = 6
STRATEGY: Final = {"halo": "spatial", "transfer": "gpipe"}
"""Under which plan a place is met; all others under either of the first two of ``STRATEGIES``."""
STRATEGIES: Final = ("data", "spatial", "gpipe")
SLACK_S: Final = 20.0
"""For a rank to print its error and end, on a busy machine."""
NAMED: Final = re.compile(
    r"(RunError|MismatchError): .*rank (?P<rank>\d+): "
    r"((all_reduce|all_gather|reduce_scatter|exchange|broadcast) of \S|(sending|receiving) \S|saving \S|all_gather in )"
)
OTHER_RANK: Final = re.compile(r"(RunError|UsageError|MismatchError): .*rank \d+")


class Bench:
    """Plans, references and the process that forks ranks; folders are removed at the end."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="layerwise-faults-"))
        self.ranks = Ranks("import examples.benchmarks.fault_training, examples.elastic")
        self._numbers = itertools.count()

    def close(self) -> None:
        """End the process and remove what was written."""
        self.ranks.__exit__()
        shutil.rmtree(self.folder, ignore_errors=True)

    @functools.cache  # noqa: B019  # there is one
    def plan(self, strategy: str, num_ranks: int, width: int = 8) -> str:
        """Return a plan as JSON text."""
        path = self.folder / f"{strategy}-{num_ranks}-{width}.json"
        left = self.ranks.run(f"{TRAINING}:plans", {str(path): [strategy, num_ranks, width]}, 1)
        if left[0].code:
            raise RuntimeError(left[0].output)
        return path.read_text()

    def job(self, strategy: str, num_ranks: int, **fields: Any) -> Job:
        """Return a job in a new folder."""
        folder = self.folder / f"{next(self._numbers)}"
        folder.mkdir()
        return Job(**{"plan": self.plan(strategy, num_ranks), "folder": str(folder), "steps": STEPS, **fields})

    def run(self, job: Job, num_ranks: int, **options: Any) -> list[Left]:
        """Do a job on forked ranks."""
        return self.ranks.run(f"{TRAINING}:run", dataclasses.asdict(job), num_ranks, **options)

    @functools.cache  # noqa: B019  # there is one
    def reference(self, strategy: str, num_ranks: int, steps: int = STEPS) -> dict[str, torch.Tensor]:
        """Return the final weights of an uninterrupted run."""
        job = self.job(strategy, num_ranks, steps=steps)
        left = self.run(job, num_ranks)
        if any(rank.code for rank in left):
            raise RuntimeError("\n".join(rank.output for rank in left))
        return final(job)


@functools.cache
def bench() -> Bench:
    """Return the one of this process."""
    found = Bench()
    atexit.register(found.close)
    return found


def final(job: Job) -> dict[str, torch.Tensor]:
    """Return the weights that a job has left."""
    return torch.load(Path(job.folder, FINAL), weights_only=True)


def difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Return the largest difference between weights; infinite if names differ, NaN counts as different."""
    if a.keys() != b.keys():
        return float("inf")
    return max(0.0 if torch.equal(a[n], b[n]) else float((a[n].double() - b[n].double()).abs().max()) for n in a)


# ---- what must hold


def ended_well(job: Job, left: Sequence[Left], faulty: int, pattern: re.Pattern[str] = NAMED) -> str:
    """Return what is wrong with how ranks have ended, where one of them failed."""
    mark = Path(job.folder, "fault-0")
    if not mark.exists():
        return f"the fault did not strike\n{_outputs(left)}"
    struck_s = float(mark.read_text())
    for rank in left:
        where = f"rank {rank.rank} (code {rank.code}, {rank.ended_s - struck_s:.1f} s behind the fault)"
        if rank.orphans:
            return f"{where} left {rank.orphans} processes"
        if rank.rank == faulty:
            continue
        if rank.code == HUNG:
            return f"{where} hung\n{rank.output}"
        last = rank.output.strip().splitlines()[-1:]
        if rank.code == 0 or not last or not pattern.search(rank.output):
            return f"{where} does not name rank, layer and collective\n{rank.output}"
        if rank.ended_s - struck_s > job.timeout_s + SLACK_S:
            return f"{where} was late\n{rank.output}"
    return ""


def goes_on(job: Job, strategy: str, num_ranks: int, other: tuple[str, int] | None = None) -> str:
    """Return what is wrong with the run that goes on from a job's checkpoint, under another plan if one is given."""
    new_strategy, new_ranks = other or (strategy, num_ranks)
    resumed = dataclasses.replace(job, plan=bench().plan(new_strategy, new_ranks), faults=(), timeout_s=60.0)
    left = bench().run(resumed, new_ranks)
    if any(rank.code for rank in left):
        return f"the run does not go on from the last checkpoint\n{_outputs(left)}"
    off = difference(final(resumed), bench().reference(strategy, num_ranks, job.steps))
    if off > (1e-6 if other else 0.0):
        return f"the resumed run ends with other weights: they differ by {off:g}"
    return ""


def _outputs(left: Iterable[Left]) -> str:
    return "\n".join(f"rank {rank.rank}, code {rank.code}:\n{rank.output}" for rank in left)


# ---- one fault each


def struck(kind: str, place: str, num_ranks: int, draw: np.random.Generator, timeout_s: float = 8.0) -> str:
    """Let a fault strike a random rank in a random step, and go on."""
    strategy = STRATEGY.get(place) or STRATEGIES[draw.integers(2 if place != "save" else 3)]
    rank = 0 if place == "rename" else int(draw.integers(num_ranks))
    step = int(draw.integers(3 if place in {"save", "rename"} else 1, STEPS - 1))
    fault, in_background = Fault(kind, place, rank, step), bool(draw.integers(2))
    job = bench().job(strategy, num_ranks, faults=(fault,), timeout_s=timeout_s, in_background=in_background)
    left = bench().run(job, num_ranks, limit_s=timeout_s + 3 * SLACK_S)
    wrong = ended_well(job, left, rank) or goes_on(job, strategy, num_ranks)
    return wrong and f"{kind} in {place} of rank {rank} of {num_ranks}, step {step}, plan {strategy}: {wrong}"


def out_of_memory(num_ranks: int, draw: np.random.Generator) -> str:
    """Let an allocation of a random rank fail, forward or backward."""
    return struck("memory", ("forward", "backward")[draw.integers(2)], num_ranks, draw)


def not_a_number(num_ranks: int, draw: np.random.Generator) -> str:
    """Give a random rank samples that are not numbers: all ranks stop in the same step, with the same words."""
    rank, step = int(draw.integers(num_ranks)), int(draw.integers(STEPS))
    job = bench().job("data", num_ranks, faults=(Fault("nan", "batch", rank, step),), checked=True)
    left = bench().run(job, num_ranks)
    said = {line for each in left for line in each.output.splitlines() if "infinite or not a number" in line}
    said = {line.partition("RunError")[2] for line in said if "RunError" in line}
    if len(said) != 1 or any(each.code != 1 for each in left) or f"of rank {rank}" not in next(iter(said)):
        return f"rank {rank} of {num_ranks}, step {step}: not the same error on all ranks: {said}\n{_outputs(left)}"
    return goes_on(dataclasses.replace(job, checked=False), "data", num_ranks)


def differing(num_ranks: int, draw: np.random.Generator) -> str:
    """Give a random rank another plan, model, step or weights: an error on all ranks that says so."""
    rank = int(draw.integers(1, num_ranks))
    what, own = {
        "plan": ("another plan", {"plan": bench().plan("spatial", num_ranks)}),
        "model": ("another model", {"width": 12}),
        "step": ("another step", {"compared_step": 7}),
        "weights": ("other weights", {"shift": 1e-12}),
    }[("plan", "model", "step", "weights")[draw.integers(4)]]
    job = bench().job("data", num_ranks, other={str(rank): own}, every=0)
    left = bench().run(job, num_ranks)
    if all(each.code == 1 and re.search(rf"MismatchError: .*{rank}.* has {what} than", each.output) for each in left):
        return ""
    return f"rank {rank} of {num_ranks} with {what}: not an error on all ranks\n{_outputs(left)}"


# ---- checkpoints


def damaged(num_ranks: int, draw: np.random.Generator) -> str:
    """Cut off or change bytes of a checkpoint: it is refused on all ranks, and the older one is loaded."""
    job = bench().job("data", num_ranks, steps=4, every=2, kept=True)
    left = bench().run(job, num_ranks)
    newest = Path(job.folder, f"{CHECKPOINT}-4")
    files = sorted(path for path in newest.iterdir() if path.stat().st_size)
    file = files[draw.integers(len(files))]
    whole = file.read_bytes()
    place = int(draw.integers(len(whole)))
    if draw.integers(2):
        file.write_bytes(whole[:place])
    else:
        changed = bytearray(whole)
        changed[place] ^= 1 << int(draw.integers(8))
        file.write_bytes(changed)
    longer = dataclasses.replace(job, steps=STEPS)
    left = bench().run(longer, num_ranks)
    where = f"{file.name}, byte {place} of {len(whole)}"
    if any(each.code for each in left):
        return f"{where}: the run does not go on from the older checkpoint\n{_outputs(left)}"
    off = difference(final(longer), bench().reference("data", num_ranks))
    is_unused = all("damaged" not in each.output for each in left)  # a gap between two pieces: nothing of it is read
    return f"{where}: the weights differ by {off:g} (seen: {not is_unused})" if off else ""


def full_disk(num_ranks: int, draw: np.random.Generator) -> str:
    """Save to a file system with 8 KiB left: an error on all ranks, and the older checkpoint stays."""
    del draw
    return _unwritable(num_ranks, "size=400k", "No space left")


def read_only(num_ranks: int, draw: np.random.Generator) -> str:
    """Let the file system become read-only: the same."""
    del draw
    return _unwritable(num_ranks, "size=16m", "Read-only file system", remount="remount,ro")


def _unwritable(num_ranks: int, options: str, expected: str, remount: str = "") -> str:
    if os.geteuid():
        raise UsageError("it mounts file systems, which only root can")
    job = bench().job("data", num_ranks, steps=2, in_background=False)
    place = Path(job.folder, "disk")
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], check=True)
    try:
        first = dataclasses.replace(job, folder=str(place))
        left = bench().run(first, num_ranks)
        if any(each.code for each in left):
            return f"the first checkpoint fits\n{_outputs(left)}"
        Path(place, FINAL).unlink()
        if remount:
            subprocess.run(["mount", "-o", remount, place], check=True)
        else:
            Path(place, "ballast").write_bytes(bytes(_free_bytes(place) - 8192))
        left = bench().run(dataclasses.replace(first, steps=4), num_ranks)
        if any(each.code != 1 or "RunError" not in each.output or expected not in each.output for each in left):
            return f"not an error on all ranks\n{_outputs(left)}"
        shutil.copytree(Path(place, CHECKPOINT), Path(job.folder, CHECKPOINT))
    finally:
        subprocess.run(["umount", place], check=True)
    return goes_on(dataclasses.replace(job, steps=STEPS), "data", num_ranks)


def _free_bytes(place: Path) -> int:
    found = os.statvfs(place)
    return found.f_bavail * found.f_bsize


# ---- networks, restarts


def cut_for_a_second(num_ranks: int, draw: np.random.Generator) -> str:
    """Take a link down in the middle of training and up again a second later: training goes on."""
    job, left = _cut(num_ranks, draw, 1.0)
    if any(rank.code for rank in left):
        return _outputs(left)
    off = difference(final(job), bench().reference("spatial", num_ranks, job.steps))
    return f"the weights differ by {off:g}" if off else ""


def cut_for_ever(num_ranks: int, draw: np.random.Generator) -> str:
    """Take a link down for ever: all ranks end with an error within the timeout, and go on when it is back."""
    job, left = _cut(num_ranks, draw, None)
    return ended_well(job, left, -1) or goes_on(job, "spatial", num_ranks)


def _cut(num_ranks: int, draw: np.random.Generator, seconds: float | None) -> tuple[Job, list[Left]]:
    from runtime.namespaces import two_hosts

    fault = Fault("mark", "halo", int(draw.integers(num_ranks)), int(draw.integers(3, 6)))
    job = bench().job("spatial", num_ranks, steps=40, faults=(fault,), timeout_s=8.0)
    with two_hosts(None) as hosts:
        places = [hosts.names[rank * 2 // num_ranks] for rank in range(num_ranks)]
        bench().ranks.start(f"{TRAINING}:run", dataclasses.asdict(job), num_ranks, hosts=places, limit_s=90.0)
        deadline_s = time.monotonic() + 60.0
        while not Path(job.folder, "fault-0").exists() and time.monotonic() < deadline_s:
            time.sleep(0.001)
        link = ["ip", "-n", hosts.names[0], "link", "set", hosts.interface(0)]
        subprocess.run([*link, "down"], check=True)
        if seconds is not None:
            time.sleep(seconds)
            subprocess.run([*link, "up"], check=True)
        return job, bench().ranks.ended()


def restarted(num_ranks: int, draw: np.random.Generator) -> str:
    """Kill a rank anywhere under ``torchrun --max-restarts``: the job ends with the bits of an uninterrupted one."""
    places = ("forward", "backward", "sync", "optimizer", "save", "rename")
    place = places[draw.integers(len(places))]
    rank = 0 if place == "rename" else int(draw.integers(num_ranks))
    fault = Fault("kill", place, rank, int(draw.integers(1, STEPS - 1)))
    job = bench().job("data", num_ranks, faults=(fault,), timeout_s=60.0)
    done = torchrun(job, num_ranks)
    where = f"kill in {place} of rank {rank} of {num_ranks}, step {fault.step}"
    if done.returncode:
        return f"{where}: torchrun ended with code {done.returncode}\n{done.stdout}\n{done.stderr}"
    if not Path(job.folder, "fault-0").exists():
        return f"{where}: the fault did not strike"
    off = difference(final(job), bench().reference("data", num_ranks))
    return f"{where}: the weights differ by {off:g}" if off else ""


def torchrun(job: Job, num_ranks: int, max_restarts: int = 2) -> subprocess.CompletedProcess[str]:
    """Do a job under torchrun, which starts all ranks again when one fails."""
    path = Path(job.folder, "job.json")
    path.write_text(job.to_json())
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(each or str(Path.cwd()) for each in sys.path), "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore",
    }  # fmt: skip
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}",
        f"--max-restarts={max_restarts}", "--monitor-interval=0.2", "-m", TRAINING, str(path),
    ]  # fmt: skip
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)


def moved(num_ranks: int, draw: np.random.Generator) -> str:
    """Kill a rank, and go on under another plan and with more or fewer ranks: the same weights within 1e-6.

    A pipeline takes batch norm's statistics over each micro-batch, so it goes on as one on another number of ranks.
    """
    old = STRATEGIES[draw.integers(len(STRATEGIES))]
    others = [("gpipe", 6 - num_ranks)]
    if old != "gpipe":
        others = [("data", 1), *((s, n) for s in STRATEGIES[:2] for n in (2, 3, 4) if (s, n) != (old, num_ranks))]
    new = others[draw.integers(len(others))]
    fault = Fault("kill", "optimizer", int(draw.integers(num_ranks)), int(draw.integers(3, STEPS - 1)))
    job = bench().job(old, num_ranks, faults=(fault,), in_background=False)
    bench().run(job, num_ranks)
    if not Path(job.folder, CHECKPOINT).exists():
        return "there is no checkpoint"
    wrong = goes_on(job, old, num_ranks, other=new)
    return wrong and f"{old} on {num_ranks} to {new[0]} on {new[1]}: {wrong}"


def elastic(num_ranks: int, draw: np.random.Generator) -> str:
    """Run ``examples/elastic.py`` on so many ranks, then on others: its losses are those of one rank, in float64."""

    def losses(folder: Path, count: int, epochs: int) -> list[float]:
        left = bench().ranks.run("examples.elastic:main", [str(folder), f"--epochs={epochs}", "--dtype=float64"], count)
        if any(rank.code for rank in left):
            raise RuntimeError(_outputs(left))
        return [float(loss) for loss in re.findall(rf"on {count} ranks: loss ([\d.]+)$", left[0].output, re.MULTILINE)]

    folder = bench().job("data", 2).folder
    counts = [num_ranks, *draw.permutation([n for n in (1, 2, 3, 4) if n != num_ranks])[:2].tolist()]
    try:
        changing = [loss for k, count in enumerate(counts) for loss in losses(Path(folder, "changing"), count, k + 1)]
        alone = losses(Path(folder, "alone"), 1, len(counts))
    except RuntimeError as error:
        return f"on {counts} ranks: {error}"
    is_same = len(changing) == len(alone) and np.allclose(changing, alone, rtol=0.0, atol=1.5e-6)
    return "" if is_same else f"on {counts} ranks the losses are {changing}, on one rank {alone}"


def repeated(num_ranks: int, draw: np.random.Generator) -> str:
    """Train twice in deterministic mode: the same bits."""
    strategy = STRATEGIES[draw.integers(len(STRATEGIES))]
    job = bench().job(strategy, num_ranks, every=0)
    left = bench().run(job, num_ranks)
    if any(rank.code for rank in left):
        return _outputs(left)
    off = difference(final(job), bench().reference(strategy, num_ranks))
    return f"{strategy} on {num_ranks}: the weights differ by {off:g}" if off else ""


# ---- the table


Trial = Callable[[int, np.random.Generator], str]


def tried(trial: Trial) -> Callable[[int], Tally]:
    """Return how a trial is repeated, on 2 and 4 ranks in turn; what went wrong is said on stderr."""

    def run(count: int) -> Tally:
        outcomes = []
        for k in range(count):
            problem = trial((2, 4)[k % 2], np.random.default_rng(k))
            if problem:
                print(f"lost, try {k}: {problem}", file=sys.stderr, flush=True)
            outcomes.append(not problem)
        return Tally.of(outcomes)

    return run


ENDS: Final = "others end with rank, layer and collective in time; resumed to the same bits"
BITS: Final = "same bits as uninterrupted"


def _at(kind: str, place: str) -> Trial:
    return lambda num_ranks, draw: struck(kind, place, num_ranks, draw)


def _stopped(num_ranks: int, draw: np.random.Generator) -> str:
    return struck(
        "stop", ("forward", "backward", "sync", "halo", "transfer", "save")[draw.integers(6)], num_ranks, draw
    )


def _soaked(count: int) -> Tally:
    """Train 2,000 steps so often; the rows of the last run are kept."""
    runs = [soak.soaked(steps=2000, every=100) for _ in range(count)]
    write_rows(soak.OUTPUT, runs[-1], soak.Row)
    return Tally.of([soak.is_flat(rows) for rows in runs])


_IN: Final = {
    "forward": "forward", "backward": "backward", "sync": "gradient sync", "optimizer": "the optimizer's step",
    "halo": "a halo exchange", "transfer": "a pipeline transfer", "save": "writing a checkpoint",
    "rename": "putting a checkpoint in place",
}  # fmt: skip

CASES: Final = (
    *(
        Case(f"kill-{place}", f"rank killed (SIGKILL) in {where}", ENDS, 2, 4, tried(_at("kill", place)))
        for place, where in _IN.items()
    ),
    Case("stop", "rank stopped (SIGSTOP) beyond the timeout", ENDS, 2, 6, tried(_stopped)),
    Case("memory", "out of memory on one rank", ENDS, 2, 4, tried(out_of_memory)),
    Case("nan", "NaN on one rank, with `require_finite`", "same error on all ranks; resumed", 2, 4,
         tried(not_a_number)),
    Case("cut-1s", "link cut for 1 s", BITS, 2, 4, tried(cut_for_a_second)),
    Case("cut", "link cut for ever", ENDS, 2, 4, tried(cut_for_ever)),
    Case("full-disk", "disk full while saving", "error on all ranks; older checkpoint resumes", 2, 4,
         tried(full_disk)),
    Case("read-only", "read-only folder while saving", "error on all ranks; older checkpoint resumes", 2, 4,
         tried(read_only)),
    Case("damaged", "checkpoint cut off, or one bit changed", "refused; older checkpoint resumes to the same bits", 4,
         20, tried(damaged)),
    Case("restart", "rank killed under `torchrun --max-restarts`", BITS, 2, 30, tried(restarted)),
    Case("moved", "goes on under another plan, more or fewer ranks", "weights within 1e-6", 4, 8, tried(moved)),
    Case("elastic", "re-planned for other numbers of ranks", "losses as on one rank, to 1.5e-6", 1, 3, tried(elastic)),
    Case("differing", "another plan, model, step or weights on one rank", "error on all ranks that says so", 4, 12,
         tried(differing)),
    Case("soak", "2,000 steps, a checkpoint every 100, two ranks", "memory, files and threads flat", 1, 1, _soaked),
    Case("repeated", "the same run twice, deterministic mode", "same bits", 2, 10, tried(repeated)),
)  # fmt: skip
