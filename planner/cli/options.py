"""What is asked on the command line of a model (``inspect``) and of a plan (``plan`` and ``compare``)."""

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal

import typer

from planner.errors import UnknownNameError, UsageError
from planner.ir.dimension import Dimension
from planner.units import parse_bytes, parse_seconds

if TYPE_CHECKING:
    from planner.space.constraints import Constraints

SAMPLES_PER_DEVICE: Final = 32
_DIGITS: Final = 18
"""Of a number that is typed: more is no number of anything here."""
"""The default batch."""
IN_CHANNEL: Final = frozenset({Dimension.IN_CHANNEL, Dimension.IN_CHANNEL_SCATTER})
SPLITTABLE: Final = tuple(d.value for d in Dimension if d not in {Dimension.REPLICATE, Dimension.BROADCAST})

_MODEL_HELP: Final = (
    "A name of `layerwise models`, torchvision:NAME, timm:NAME, package.module:callable or path/to/file.py:callable."
)

Shape = tuple[int, ...]
"""Of one sample, the batch left out."""


@dataclass(frozen=True, slots=True)
class AskedModel:
    """The model and its inputs as they were typed; the methods turn them into values.

    Raises:
        UsageError: from every method, where its text cannot be understood.
    """

    model: Annotated[str, typer.Argument(metavar="MODEL", help=_MODEL_HELP, show_default=False)]
    shapes: Annotated[
        list[str] | None,
        typer.Option(
            "--input", metavar="[NAME=]SIZES",
            help="One sample, such as 3,224,224; mask=1,224,224 is an argument by name, age= one number. Repeat per "
            "input.",
        ),
    ] = None  # fmt: skip
    model_args: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="For the model's callable; repeat for more."),
    ] = None

    def input_shapes(self) -> tuple[tuple[Shape, ...], dict[str, Shape]]:
        """Return the size of one sample of each ``--input``: those by position, and those by name."""
        found = list(self._inputs())
        named = [(name, shape) for name, shape in found if name]
        if repeated := [name for name, count in Counter(name for name, _ in named).items() if count > 1]:
            raise UsageError(f"--input {repeated[0]}= is given twice")
        return tuple(shape for name, shape in found if not name), dict(named)

    def inputs_of(self, known: Sequence[Shape]) -> tuple[tuple[Shape, ...], dict[str, Shape]]:
        """Return what ``input_shapes`` returns, or the sizes that the model is known to take if there is none."""
        given, named = self.input_shapes()
        if not given and not named and not known:
            raise UsageError(f"the input size of {self.model!r} is not known: give --input, as in --input 3,224,224")
        return (given, named) if given or named else (tuple(known), {})

    def arguments(self) -> dict[str, str | int | float | bool]:
        """Return ``--model-args``."""
        return dict(_argument(part) for text in self.model_args or () for part in text.split(","))

    def _inputs(self) -> Iterator[tuple[str, Shape]]:
        for text in self.shapes or ():
            name, equals, sizes = text.rpartition("=")
            if equals and not name.strip().isidentifier():
                raise UsageError(f"--input {text!r}: {name!r} cannot be the name of an argument of forward()")
            yield name.strip(), () if equals and not sizes.strip() else _shape(sizes, text)


@dataclass(frozen=True, slots=True)
class Asked(AskedModel):
    """The plan as it was typed; the methods turn it into values.

    Raises:
        UsageError: from every method, where its text cannot be understood.
    """

    devices: Annotated[int | None, typer.Option(min=1, metavar="N", help="That many equal accelerators.")] = None
    cluster: Annotated[
        str | None,
        typer.Option(metavar="FILE|NAME", help="A machine, such as 4xa100-nvlink or local-4."),
    ] = None
    batch: Annotated[
        str | None,
        typer.Option(metavar="B", help="Samples per step; 32 per device if left out. compare takes several: 128,256."),
    ] = None
    precision: Annotated[Literal["fp32", "tf32", "bf16"], typer.Option(help="bf16 is autocast.")] = "fp32"
    optimizer: Annotated[Literal["sgd", "momentum", "adam"], typer.Option(help="For its memory and time.")] = "momentum"
    solver: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="auto, dp, ilp, exhaustive; published: hypar, soybean, optcnn, pase, mcmc; or fixed: data, model "
            "(model-out), model-in, conv-data-fc-model, spatial, sample-spatial, channel-filter, fsdp.",
        ),
    ] = "auto"
    dims: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="What may be split, such as sample,out_channel,height. By default samples and channels; space too "
            "where there are fewer samples than devices.",
        ),
    ] = None
    mesh: Annotated[str | None, typer.Option(metavar="SIZES", help="Such as node=8,gpu=4x2; searched if left out.")] = (
        None
    )
    memory_limit: Annotated[
        str | None,
        typer.Option(metavar="BYTES", help="Per device, such as 16GiB; all of its memory if left out."),
    ] = None
    time_limit: Annotated[str, typer.Option(metavar="TIME", help="For the search.")] = "60s"
    io: Annotated[
        Literal["per-rank", "global", "local"] | None,
        typer.Option(
            help="Each rank passes its own samples, the default where there are enough, or the whole batch, or the "
            "region (samples and space) that the plan gives it.",
        ),
    ] = None
    local_batch_norm: Annotated[
        bool,
        typer.Option(
            "--no-sync-batch-norm",
            help="Statistics of each rank's own samples, as with plain DDP, not of the global batch.",
        ),
    ] = False
    pin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LAYERS=DIMENSION",
            help="Give layers a split: 'fc*=out_channel' on every axis, 'c1=gpu:sample' on one; commas between axes. "
            "Repeat for more.",
        ),
    ] = None
    forbid: Annotated[
        list[str] | None,
        typer.Option(metavar="LAYERS=DIMENSIONS", help="Such as 'conv*=in_channel'. Repeat for more."),
    ] = None
    tie: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LAYERS",
            help="The same split for all of these that have the same legal dimensions, such as 'layer1.*'. Repeat for "
            "more.",
        ),
    ] = None
    parameter_sharding: Annotated[
        Literal["none", "optimizer", "full"] | None,
        typer.Option(
            help="Cut optimizer state, or parameters and gradients too, over ranks (ZeRO, FSDP). None but with fsdp."
        ),
    ] = None
    halo_overlap: Annotated[
        Literal["auto", "always", "never"],
        typer.Option(help="Exchange border rows beside computation: where that is predicted to be faster, or as told."),
    ] = "auto"
    shares: Annotated[
        Literal["auto", "equal"],
        typer.Option(help="Where devices are not equally fast: pieces in proportion to their speeds, or equal ones."),
    ] = "auto"
    branches: Annotated[
        Literal["auto", "none"],
        typer.Option(
            help="Run branches of the network at the same time, on different ranks: where that is predicted to be "
            "faster, or never."
        ),
    ] = "auto"
    halo_recompute: Annotated[
        Literal["auto", "always", "never"],
        typer.Option(
            help="Compute border rows of neighbours instead: where that is predicted to be faster, or as told."
        ),
    ] = "auto"
    all_devices: Annotated[
        bool, typer.Option("--all-devices", help="Use every device, even where fewer are predicted to be faster.")
    ] = False
    stages: Annotated[
        str,
        typer.Option(
            metavar="auto|K", help="A pipeline of K stages, or of as many as are fastest if that is faster than none."
        ),
    ] = "1"
    schedule: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Of a pipeline: gpipe, 1f1b, interleaved, zero-bubble; the fastest if left out. stale and pipedream "
            "train with weights of earlier steps.",
        ),
    ] = None
    microbatches: Annotated[
        int | None, typer.Option(min=1, metavar="M", help="Of a pipeline; the fastest number if left out.")
    ] = None
    profile: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="A device profile to price layers with; those shipped for the device if left out."
        ),
    ] = None

    def batches(self) -> tuple[int, ...]:
        """Return all of ``--batch``."""
        return () if self.batch is None else counts("--batch", self.batch)

    def batch_size(self) -> int | None:
        """Return the only one of ``--batch``."""
        found = self.batches()
        if len(found) > 1:
            raise UsageError(f"--batch {self.batch}: only compare takes several batches, this command one")
        return found[0] if found else None

    def dimensions(self) -> frozenset[Dimension] | None:
        """Return ``--dims``; ``in_channel`` stands for both of its forms."""
        if self.dims is None:
            return None
        return frozenset(d for name in self.dims.split(",") for d in _dimensions(name.strip()))

    def constraints(self) -> "Constraints":
        """Return ``--pin``, ``--forbid`` and ``--tie``."""
        from planner.space.constraints import Constraints

        return Constraints.of(self.pin or (), self.forbid or (), self.tie or ())

    def num_stages(self) -> int | Literal["auto"]:
        """Return ``--stages``."""
        if self.stages == "auto":
            return "auto"
        if not self.stages.isdecimal() or int(self.stages) < 1:
            raise UsageError(f"--stages {self.stages!r} is neither auto nor a number of at least 1")
        return int(self.stages)

    def memory_limit_bytes(self) -> int | None:
        """Return ``--memory-limit``."""
        return None if self.memory_limit is None else parse_bytes(self.memory_limit)

    def time_limit_s(self) -> float:
        """Return ``--time-limit``."""
        return parse_seconds(self.time_limit)


def counts(option: str, text: str) -> tuple[int, ...]:
    """Return the whole numbers of a list such as ``1,2,4``, each once.

    Raises:
        UsageError: one is none, or less than 1.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(map(_is_count, parts)):
        raise UsageError(f"{option} {text!r} is not a number of at least 1, or several with commas between them")
    return tuple(dict.fromkeys(map(int, parts)))


def _is_count(text: str) -> bool:
    return text.isdecimal() and len(text) <= _DIGITS and int(text) >= 1


def _shape(sizes: str, text: str) -> Shape:
    found = sizes.split(",")
    if not all(_is_count(size.strip()) for size in found):
        raise UsageError(f"--input {text!r} is not a size of one sample, such as 3,224,224")
    return tuple(map(int, found))


@dataclass(frozen=True, slots=True)
class Timed:
    """How long is measured."""

    steps: Annotated[int, typer.Option(help="Timed steps.", min=1, max=100_000)] = 10
    warmup: Annotated[int, typer.Option(help="Steps before them.", min=0, max=1000)] = 2
    timeout: Annotated[float, typer.Option(help="Seconds after which a run is given up.", min=1)] = 1800.0


def _dimensions(name: str) -> Iterator[Dimension]:
    if name not in SPLITTABLE:
        raise UnknownNameError("dimension", name, SPLITTABLE, "(--dims)")
    yield from IN_CHANNEL if name == Dimension.IN_CHANNEL else (Dimension(name),)


def _argument(text: str) -> tuple[str, str | int | float | bool]:
    name, equals, value = text.strip().partition("=")
    if not equals or not name.isidentifier():
        raise UsageError(f"--model-args {text!r} is not of the form key=value")
    if value.encode(errors="replace").decode() != value:
        raise UsageError(f"--model-args {text!r} is not UTF-8 text, as plans are")
    try:
        found = json.loads(value.lower() if value in {"True", "False"} else value)
    except (ValueError, RecursionError):
        found = value
    is_number = isinstance(found, int | float) and abs(found) < math.inf  # a plan has no others
    return name, found if is_number else value
