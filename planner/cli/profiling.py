"""``layerwise profile``: what is measured, fitted and imported of devices and links; ``layers`` itself."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, Literal

import typer

from planner.cli.options import Asked, AskedModel, counts
from planner.cli.planning import prepared, refuse_unwritable
from planner.cli.signature import with_fields
from planner.cli.terminal import Terminal
from planner.errors import UsageError
from planner.units import parse_seconds

if TYPE_CHECKING:
    from planner.measure.session import Summary
    from planner.profile.key import PieceKey

ALL: Final = "all"
ALL_MODELS: Final = ("alexnet", "vgg16", "resnet50", "torchvision:inception_v3", "torchvision:mobilenet_v2")
"""What ``all`` stands for: convolutions of many shapes, 1x1 and depthwise ones among them."""

profile_app: Final = typer.Typer(no_args_is_help=True, help="Measure layers and links, fit and import measurements.")


def register(name: str, function: Callable[..., None]) -> None:
    """Add a command to ``layerwise profile``; parameters that are dataclasses give it their fields as options."""
    profile_app.command(name)(with_fields(function))


@dataclass(frozen=True, slots=True)
class AskedLayers(AskedModel):
    """Which layers are timed, and how."""

    devices: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Pieces for that many equal devices; 1 is the whole model.")
    ] = None
    cluster: Annotated[str | None, typer.Option(metavar="FILE|NAME", help="Pieces for this machine.")] = None
    mesh: Annotated[
        str | None, typer.Option(metavar="SIZES", help="Such as gpu=4x2; that of whole levels if left out.")
    ] = None
    all_meshes: Annotated[
        bool, typer.Option("--all-meshes", help="Pieces of every candidate mesh that a search looks at.")
    ] = False
    batch: Annotated[int | None, typer.Option(min=1, metavar="B", help="Samples per step; 32 per device.")] = None
    dims: Annotated[str | None, typer.Option(metavar="LIST", help="What may be split, such as sample,out_channel.")] = (
        None
    )
    microbatches: Annotated[
        str | None,
        typer.Option(metavar="LIST", help="Also pieces of stages, at these numbers of micro-batches, such as 1,4,8."),
    ] = None
    local_batch_norm: Annotated[
        bool, typer.Option("--no-sync-batch-norm", help="Batch norms on each rank's own samples.")
    ] = False
    precision: Annotated[Literal["fp32", "tf32", "bf16"], typer.Option(help="bf16 is autocast.")] = "fp32"
    memory_format: Annotated[Literal["contiguous", "channels_last"], typer.Option(help="Of tensors with space.")] = (
        "contiguous"
    )
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="What is measured.")] = "cpu"
    ranks_at_once: Annotated[
        int, typer.Option(min=1, max=64, metavar="K", help="Processes that time the same layer together.")
    ] = 1
    threads: Annotated[
        int | None, typer.Option(min=1, metavar="T", help="Of each process; its part of the processors if left out.")
    ] = None
    repeat: Annotated[
        str, typer.Option(metavar="TIME", help="Pieces that take longer are timed with fewer samples.")
    ] = "0.3s"
    budget: Annotated[
        str | None, typer.Option(metavar="TIME", help="Stop then; what was timed is a sample of all pieces.")
    ] = None

    def plan(self, model: str) -> Asked:
        """Return the request for a plan whose search asks for these pieces."""
        return Asked(
            model, self.shapes, self.model_args, self.devices, self.cluster,
            None if self.batch is None else str(self.batch), self.precision,
            dims=self.dims, mesh=self.mesh, local_batch_norm=self.local_batch_norm,
        )  # fmt: skip

    def numbers_of_microbatches(self) -> tuple[int, ...]:
        """Return ``--microbatches``.

        Raises:
            UsageError: it is no list of numbers of at least 1.
        """
        return counts("--microbatches", self.microbatches) if self.microbatches else ()

    def models(self) -> tuple[str, ...]:
        """Return the MODEL arguments.

        Raises:
            UsageError: inputs or arguments are given for more than one.
        """
        if self.model != ALL:
            return (self.model,)
        if self.shapes or self.model_args:
            raise UsageError("--input and --model-args are of one model, not of `all`")
        return ALL_MODELS


def layers(
    context: typer.Context,
    asked: AskedLayers,
    terminal: Terminal,
    output: Annotated[Path, typer.Option("--output", "-o", help="The device profile; a second call goes on with it.")],
) -> None:
    """Time every piece of every layer that a search could ask for, on this device.

    MODEL may be `all`: AlexNet, VGG-16, ResNet-50, Inception-v3 and MobileNet-v2.
    """
    refuse_unwritable(output)
    budget_s, repeat_s = asked.budget and parse_seconds(asked.budget), parse_seconds(asked.repeat)
    if asked.devices is None and asked.cluster is None:
        raise UsageError("say whose pieces: --devices N or --cluster NAME; --devices 1 is the model as it is")

    import torch

    from planner.api import time_layers
    from planner.measure.host import threads_per_rank
    from planner.measure.recording import Recording, environment
    from planner.measure.session import Limits, measure_pieces
    from planner.measure.sizing import Rates

    _refuse_device(asked)
    device = torch.device(asked.device)
    threads = asked.threads or threads_per_rank(asked.ranks_at_once)
    here = environment(device, threads, asked.ranks_at_once, context.obj or "")
    recording = Recording.open(output, output.stem, here)
    with terminal.working("listing pieces"):
        pieces = [piece for model in asked.models() for piece in _pieces(asked, model, terminal)]
    timing = functools.partial(
        time_layers, ranks_at_once=asked.ranks_at_once, threads=asked.threads, device=asked.device
    )
    with _threads(threads):
        rates = Rates.of(device, torch.bfloat16 if asked.precision == "bf16" else torch.float32)
    with terminal.bar("timing layers") as progress:
        limits = Limits(repeat_s, budget_s or None)
        summary = measure_pieces(pieces, recording, timing, rates, limits, progress)
    for sentence in _sentences(summary, output):
        terminal.err.print(sentence)


def _refuse_device(asked: AskedLayers) -> None:
    import torch

    if asked.device == "cuda" and torch.cuda.device_count() < asked.ranks_at_once:
        raise UsageError(
            f"--device cuda needs a CUDA device for each of --ranks-at-once {asked.ranks_at_once}, found "
            f"{torch.cuda.device_count()}"
        )
    if asked.device == "cpu" and asked.precision == "tf32":
        raise UsageError("tf32 is a mode of NVIDIA GPUs: use --device cuda, or --precision fp32")


def _pieces(asked: AskedLayers, model: str, terminal: Terminal) -> "list[PieceKey]":
    planner = prepared(asked.plan(model), terminal)
    return planner.layer_pieces(
        None if asked.all_meshes else planner.meshes()[:1], asked.memory_format, asked.numbers_of_microbatches()
    )


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _sentences(summary: "Summary", output: Path) -> Iterator[str]:
    yield (
        f"{summary.num_pieces} pieces: {summary.num_timed} timed now, {summary.num_known} known before, "
        f"{summary.num_shortened} by pieces of fewer samples"
    )
    if summary.without_kernel:
        names = ", ".join(f"{name} ({count})" for name, count in sorted(summary.without_kernel.items()))
        yield f"without a kernel of their own, priced by the roofline: {names}"
    if summary.num_left:
        yield f"time is up: {summary.num_left} pieces left; the same command goes on"
    yield f"wrote {output}" if summary.num_timed else f"{output} has it all already" if not summary.num_left else ""


register("layers", layers)
