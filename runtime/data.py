"""What each rank reads: its samples of every global batch and, where a plan cuts images, its region of each.

``loader`` is the whole of it. ``Batches`` (which samples) and ``own_part`` (which region) serve loops of other kinds.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, default_collate

from planner.errors import MismatchError, UsageError
from planner.ir.dimension import Dimension
from planner.ir.layout import Layout, piece_weights
from planner.ir.region import Region
from planner.ir.rules import InputOutput, io_layout
from planner.ir.split import Split
from planner.ir.tensor import TensorSpec
from planner.plan.schema import Plan
from runtime.feed import input_layouts, own_region

Part = tuple[slice, ...]
"""Of one element of a sample, without the batch; dimensions that are not named are whole."""

T = TypeVar("T")


def own_part(plan: Plan, rank: int, name: str | None = None, size: int | None = None) -> Part:
    """Return which part of an input of the whole batch a rank passes, as slices of all its dimensions.

    Args:
        plan: the plan.
        rank: in the job.
        name: of the input; the first that has samples unless given.
        size: of the global batch, where it is not the planned one.
    """
    layouts = input_layouts(plan)
    layout = layouts[name] if name is not None else _first(plan, layouts)
    batched = layout.shape[0] == plan.batch
    region = own_region(layout, plan.mesh.ranks.index(rank), size if batched else None)
    return tuple(slice(a, b) for a, b in zip(region.start, region.stop, strict=True))


def own_samples(plan: Plan, rank: int, size: int | None = None) -> slice:
    """Return which samples of a global batch a rank passes."""
    return own_part(plan, rank, None, size)[0]


def _first(plan: Plan, layouts: dict[str, Layout]) -> Layout:
    return next((x for x in layouts.values() if x.shape[0] == plan.batch), next(iter(layouts.values())))


def smallest_batch(plan: Plan) -> int:
    """Return a number of samples from which on no rank and no layer of a plan gets an empty piece."""
    found = 1
    for split in plan.strategy.values():
        shares = split.weights or (None,) * len(plan.mesh.axes)
        cut = [k for k, d in enumerate(split.dimensions) if d is Dimension.SAMPLE]
        weights = piece_weights(tuple(plan.mesh.shape[k] for k in cut), tuple(shares[k] for k in cut))
        found = max(found, -(-sum(weights) // min(weights)))
    return found


class Batches(Sampler[list[int]]):
    """The samples that a rank passes of every global batch; a ``batch_sampler`` for a ``DataLoader``.

    Global batch k of an epoch consists of the same samples on all ranks, whatever the plan: those that one device would
    train on in its step k. The last one may be smaller; where it would leave a rank without samples, all ranks leave it
    out. Ranks that hold different regions of the same images get the same samples.

    Args:
        num_samples: of the dataset.
        plan: the plan.
        rank: in the job; that of this process unless given.
        batch: samples of all ranks per step, if not as planned.
        shuffle: in a new order in every epoch (``set_epoch``).
        drop_last: leave out a last batch that is smaller.
        seed: of the order; equal on all ranks.

    Raises:
        UsageError: not even one batch can be made.
    """

    def __init__(
        self,
        num_samples: int,
        plan: Plan,
        rank: int | None = None,
        *,
        batch: int | None = None,
        shuffle: bool = False,
        drop_last: bool = False,
        seed: int = 0,
    ) -> None:
        self.num_samples, self.batch = num_samples, plan.batch if batch is None else batch
        self._plan, self._rank = plan, own_rank(rank)
        self._shuffle, self._seed, self._epoch, self._start = shuffle, seed, 0, 0
        full, rest = divmod(num_samples, self.batch)
        needed = smallest_batch(plan)
        self._count = full + (rest >= needed and not drop_last and rest > 0)
        if self.batch < needed or self._count == 0:
            raise UsageError(
                f"{num_samples} samples in batches of {self.batch} give no batch of which every rank gets a part: this "
                f"plan needs at least {needed} samples in a batch{', and drop_last a whole one' * drop_last}."
            )

    @property
    def num_dropped(self) -> int:
        """How many samples an epoch leaves out, on all ranks."""
        return max(self.num_samples - self._count * self.batch, 0)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the order of the next iterations; skip this many batches (of a run that is resumed) in the first."""
        self._epoch, self._start = epoch, start

    def __len__(self) -> int:
        return self._count - self._start

    def __iter__(self) -> Iterator[list[int]]:
        start, self._start = self._start, 0
        for samples in self.global_batches(start):
            yield samples[own_samples(self._plan, self._rank, len(samples))]

    def global_batches(self, start: int = 0) -> Iterator[list[int]]:
        """Yield the samples of all ranks, batch by batch."""
        order = list(range(self.num_samples))
        if self._shuffle:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self._epoch)
            order = torch.randperm(self.num_samples, generator=generator).tolist()
        for k in range(start, self._count):
            yield order[k * self.batch : (k + 1) * self.batch]


def own_rank(rank: int | None) -> int:
    """Return a rank, or that of this process if none is given."""
    if rank is not None:
        return rank
    return dist.get_rank() if dist.is_initialized() else 0


# ---- regions of samples


@runtime_checkable
class RegionReader(Protocol):
    """A dataset that reads regions of its samples, so that a rank touches only what it needs.

    A sample is a tuple: the model's inputs in the order of the plan, then targets.

    Attributes:
        shapes: of the elements of a sample, without the batch.
    """

    shapes: Sequence[tuple[int, ...]]

    def __len__(self) -> int: ...

    def read(self, index: int, parts: Sequence[Part | None]) -> Sequence[Any]:
        """Return these parts of the elements of a sample; what is asked for by None may be anything."""
        ...


class ArrayDataset(Dataset[tuple[torch.Tensor, ...]]):
    """Arrays with the samples in their first dimension, read region by region.

    Args:
        arrays: NumPy arrays, those of ``np.load(path, mmap_mode="r")``, datasets of h5py or zarr: whatever has a
            ``shape`` and takes a tuple of an integer and slices.
    """

    def __init__(self, *arrays: Any) -> None:
        lengths = {a.shape[0] for a in arrays}
        if len(lengths) != 1:
            raise UsageError(f"arrays of one dataset need equally many samples; these have {sorted(lengths)}")
        self._arrays = arrays
        self.shapes = [tuple(a.shape[1:]) for a in arrays]

    def __len__(self) -> int:
        return int(self._arrays[0].shape[0])

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        return self.read(index, [()] * len(self._arrays))

    def read(self, index: int, parts: Sequence[Part | None]) -> tuple[torch.Tensor, ...]:
        """Return parts of the elements of a sample, as tensors with memory of their own; nothing for None."""
        return tuple(
            torch.empty(0) if part is None else torch.as_tensor(np.array(a[(index, *part)]))
            for a, part in zip(self._arrays, parts, strict=True)
        )


class _Wanted(NamedTuple):
    """A sample, and what of it this rank needs: inputs, targets or both."""

    number: int
    inputs: bool
    targets: bool


Roles = Sequence[Dimension | str | None]
"""Of a target's dimensions, without the batch: what each holds."""


@dataclass(frozen=True)
class _Regions:
    """Which regions a rank reads under ``io: local``.

    Attributes:
        plan: the plan.
        position: of the rank in the mesh.
        targets: roles of the targets' dimensions; what is not listed is cut by samples only.
    """

    plan: Plan
    position: int
    targets: tuple[tuple[Dimension | None, ...], ...]

    @property
    def outputs(self) -> list[Split]:
        """The splits of the outputs, in order."""
        parts = [layer for stage in self.plan.stages for layer in stage.layers if layer.op == "output"]
        return [self.plan.strategy[layer.id] for layer in parts]  # type: ignore[index]  # ids are plain text in files

    def inputs(self) -> list[Part]:
        """Return the parts of a sample's inputs."""
        layouts = input_layouts(self.plan)
        return [_part(own_region(layout, self.position)) for layout in layouts.values()]

    def target(self, k: int, shape: tuple[int, ...]) -> Part:
        """Return the part of target k of a sample.

        Raises:
            MismatchError: its dimensions are not those that are said, or lack one that the output is cut by.
        """
        if k >= len(self.targets):
            return ()
        return _part(self._layout(k, self.plan.batch, shape).region(self.position))

    def samples(self, k: int | None, batch: int) -> slice:
        """Return which samples of a batch the rank needs of the inputs (k is None) or of target k."""
        if k is None:
            first = _first(self.plan, input_layouts(self.plan))
            region = own_region(first, self.position, batch)
        else:
            region = self._layout(k, batch, None).region(self.position)
        return slice(region.start[0], region.stop[0])

    def _layout(self, k: int, batch: int, shape: tuple[int, ...] | None) -> Layout:
        roles = self.targets[k] if k < len(self.targets) else ()
        splits = self.outputs
        split = splits[min(k, len(splits) - 1)]
        if shape is None:
            roles = ()
            dims = tuple(d if d is Dimension.SAMPLE else Dimension.REPLICATE for d in split.dimensions)
            cut = {axis: own for axis, own in split.shares if dict(split.axes)[axis] is Dimension.SAMPLE}
            spec = TensorSpec((batch,), roles=(Dimension.SAMPLE,))
            return io_layout(spec, self.plan.mesh, Split.of(self.plan.mesh, dims).with_shares(cut))
        if len(roles) != len(shape):
            raise MismatchError(f"target {k} of a sample has shape {shape}, but its dimensions are said to be {roles}")
        try:
            spec = TensorSpec((batch, *shape), roles=(Dimension.SAMPLE, *roles))
            return io_layout(spec, self.plan.mesh, split)
        except KeyError as error:
            raise MismatchError(
                f"the plan splits output {min(k, len(splits) - 1)} as {split}, but target {k} has no such dimension: "
                f"{roles}"
            ) from error


def _part(region: Region) -> Part:
    return tuple(slice(a, b) for a, b in zip(region.start[1:], region.stop[1:], strict=True))


class _RegionBatches(Sampler[list[_Wanted]]):
    """As ``Batches``, where a rank may need the inputs of other samples than the targets."""

    def __init__(self, batches: Batches, regions: _Regions) -> None:
        self.batches, self._regions = batches, regions

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[_Wanted]]:
        start, self.batches._start = self.batches._start, 0
        for samples in self.batches.global_batches(start):
            inputs = set(range(len(samples))[self._regions.samples(None, len(samples))])
            targets = set(range(len(samples))[self._regions.samples(0, len(samples))])
            yield [_Wanted(samples[k], k in inputs, k in targets) for k in sorted(inputs | targets)]


class _RegionDataset(Dataset[list[Any]]):
    """A dataset, read region by region where it can be, else cut."""

    def __init__(self, dataset: Any, regions: _Regions) -> None:
        self._dataset, self._regions = dataset, regions
        self._inputs = regions.inputs()

    def __getitem__(self, wanted: _Wanted) -> list[Any]:
        if isinstance(self._dataset, RegionReader):
            parts = self._parts(wanted, self._dataset.shapes)
            found = list(self._dataset.read(wanted.number, parts))
        else:
            whole = self._dataset[wanted.number]
            whole = whole if isinstance(whole, tuple | list) else (whole,)
            parts = self._parts(wanted, [tuple(getattr(x, "shape", ())) for x in whole])
            found = [x if not part else x[part] for x, part in zip(whole, parts, strict=True)]
        return [_NOTHING if part is None else x for x, part in zip(found, parts, strict=True)]

    def _parts(self, wanted: _Wanted, shapes: Sequence[tuple[int, ...]]) -> list[Part | None]:
        count = len(self._inputs)
        inputs: list[Part | None] = [part if wanted.inputs else None for part in self._inputs]
        targets = [self._regions.target(k, s) if wanted.targets else None for k, s in enumerate(shapes[count:])]
        return inputs + targets


class _Nothing:
    """Stands for what a rank does not need of a sample."""


_NOTHING = _Nothing()


def _collate(samples: list[list[Any]]) -> list[Any]:
    columns = zip(*samples, strict=True)
    return [default_collate([x for x in column if not isinstance(x, _Nothing)]) for column in columns]


class Loader(DataLoader[Any]):
    """A ``DataLoader`` over what a rank passes; made by ``loader``."""

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the order of the next epoch, and how many batches of it to skip; as of ``Batches``."""
        sampler: Any = self.batch_sampler
        getattr(sampler, "batches", sampler).set_epoch(epoch, start)


def loader(  # noqa: PLR0913  # what DataLoader and DistributedSampler have
    dataset: Any,
    plan: Plan,
    *,
    rank: int | None = None,
    batch: int | None = None,
    shuffle: bool = False,
    drop_last: bool = False,
    seed: int = 0,
    targets: Sequence[Roles] = (),
    **options: Any,
) -> Loader:
    """Return a data loader that gives a rank what it passes to the parallel module, and the targets of its outputs.

    A sample is a tuple: the model's inputs in the order of the plan, then targets. Under ``io: per-rank`` a rank gets
    its samples, under ``io: global`` the whole batch, under ``io: local`` its region of its samples. A dataset with
    ``read(index, parts)`` (``RegionReader``; ``ArrayDataset`` is one) reads only this region; of others whole samples
    are read and cut.

    Args:
        dataset: with ``len`` and samples by index.
        plan: the plan.
        rank: in the job; that of this process unless given.
        batch: samples of all ranks per step, if not as planned.
        shuffle: as of ``Batches``.
        drop_last: as of ``Batches``.
        seed: as of ``Batches``.
        targets: only for ``io: local``: what the dimensions of each target hold, without the batch, such as
            ``[("height", "width")]`` for class maps. Target k is cut as output k of the model; targets that are not
            listed are cut by samples only.
        options: of ``torch.utils.data.DataLoader``: ``num_workers``, ``pin_memory``, …

    Raises:
        UsageError: the dataset has no length, or too few samples for one batch.
    """
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise UsageError("the loader needs a dataset with a length and samples by index; this one only iterates")
    rank = own_rank(rank)
    batches = Batches(
        len(dataset), plan, rank, batch=batch, shuffle=shuffle, drop_last=drop_last, seed=seed
    )  # fmt: skip
    if plan.input_output is not InputOutput.LOCAL:
        return Loader(dataset, batch_sampler=batches, **options)
    roles = tuple(tuple(None if d is None else Dimension(d) for d in each) for each in targets)
    regions = _Regions(plan, plan.mesh.ranks.index(rank), roles)
    sampler: Any = _RegionBatches(batches, regions)
    return Loader(_RegionDataset(dataset, regions), batch_sampler=sampler, **{"collate_fn": _collate, **options})
