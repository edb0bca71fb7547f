"""Times single layers on the shapes of one device's piece, from their profile keys alone.

A layer is timed as it runs inside a training step: outputs and gradients are fresh memory, freed where autograd frees
them; what the step made just before (inputs in the forward pass, the gradient of the output in the backward pass) is
as hot in the caches as making it leaves it; so is the code, which a twin of the layer has just run; everything else
(weights, activations kept for backward) is not.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from planner.errors import UsageError
from planner.measure.clock import Alone, Evictor, Timing, elapsed, time_phases
from planner.measure.kernels import GlobalNorm, Kernel, Maker, kernel_of
from planner.profile.key import PieceKey
from planner.profile.table import Measurement

Found = Callable[[str, Measurement | None], None]
_Context = contextlib.AbstractContextManager[object]


class LayerTimer:
    """Times layers on one device.

    Args:
        device: where.
        global_norm: the runtime's batch norm over several ranks, with nothing sent.
        others: processes that time the same layers at the same time. Each phase begins on all of them at once, so that
            none is timed while another prepares.
    """

    def __init__(self, device: torch.device, global_norm: GlobalNorm, others: Alone | None = None) -> None:
        self._device, self._global_norm, self._others = device, global_norm, others or Alone()
        self._evict = Evictor(device)

    def time(self, key: PieceKey) -> Measurement | None:
        """Return the median times of a piece, or None where it has no kernel of its own.

        Raises:
            UsageError: the device cannot compute in the key's precision, or has no room for the piece.
        """
        if key.precision == "tf32" and self._device.type != "cuda":
            raise UsageError("tf32 is a mode of NVIDIA GPUs: use --device cuda, or another --precision")
        channels_last = key.memory_format == "channels_last"
        generator = torch.Generator(self._device).manual_seed(0)
        make = Maker(self._device, getattr(torch, key.dtype), channels_last, generator)
        try:
            with products_in(key.precision):
                kernel = kernel_of(key, make, self._global_norm)
                if kernel is None:
                    return None
                self._make_room(kernel)
                twin = kernel_of(key, make, self._global_norm) if self._is_small(kernel) else None
                return self._timed(key, kernel, twin)
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            raise UsageError(f"no memory left to time {key.text}: use a smaller --batch") from error

    def _is_small(self, kernel: Kernel) -> bool:
        """Return whether it matters that the code of a pass, evicted along with the data, has to be read again.

        In a step other layers have run the same code a moment ago. Reading it again takes a processor 0.3 to 0.7 ms; an
        accelerator is handed the next layers meanwhile.
        """
        return self._device.type == "cpu" and kernel.num_bytes < self._evict.num_bytes

    def _make_room(self, kernel: Kernel) -> None:
        """Touch as much memory as the gradients take, three times over, for pieces of it are in use.

        A process that keeps its memory (``runtime.launch.KEEP_MEMORY``) has it after its first steps. Until then the
        system hands it out page by page: 0.2 to 1.2 s for the 411 MB of VGG-16's first linear layer.
        """
        if self._device.type == "cpu":
            torch.ones(3 * kernel.num_bytes, dtype=torch.uint8)

    def _timed(self, key: PieceKey, kernel: Kernel, twin: Kernel | None) -> Measurement:
        autocast: _Context = contextlib.nullcontext()
        if key.precision == "bf16":
            autocast = torch.autocast(self._device.type, torch.bfloat16)
        timed, warms = _Pass(kernel, autocast), [] if twin is None else [_Pass(twin, autocast)]

        def once() -> tuple[float, float, float]:
            return self._once(timed, warms)

        forward, data, joint = time_phases(once, self._others)
        return _measurement(forward, data, joint, both=timed.goes_both_ways, trains=bool(kernel.params))

    def _once(self, timed: "_Pass", warms: Sequence["_Pass"]) -> tuple[float, float, float]:
        """Return the seconds of forward, backward of the inputs alone (0 unless both ways), and backward of all."""

        def seconds(prepare: Callable[[_Pass], None], phase: Callable[[_Pass], None]) -> float:
            self._evict()
            for warm in warms:
                prepare(warm)
                phase(warm)
            prepare(timed)
            self._others.start()
            return elapsed(functools.partial(phase, timed), self._device)

        forward_s = seconds(_Pass.make_inputs, _Pass.forward)
        if not timed.goes_back:
            return forward_s, 0.0, 0.0
        data_s = seconds(_Pass.make_gradients, _Pass.backward_of_inputs) if timed.goes_both_ways else 0.0
        return forward_s, data_s, seconds(_Pass.make_gradients, _Pass.backward)


class _Pass:
    """A kernel's way forward and back, phase by phase; before each come the tensors that a step has just made then.

    Args:
        kernel: what is called.
        autocast: around its forward pass.

    Attributes:
        goes_both_ways: backward computes gradients of inputs and of parameters.
    """

    def __init__(self, kernel: Kernel, autocast: _Context) -> None:
        self._kernel, self._autocast = kernel, autocast
        self._leaves = [x for x in kernel.inputs if x.requires_grad]
        self.goes_both_ways = bool(self._leaves and kernel.params)
        self._roots: list[torch.Tensor] = []
        self._gradients: list[torch.Tensor] = []

    def make_inputs(self) -> None:
        """Read and write the inputs, as the layer that makes them would."""
        for tensor in (*self._kernel.inputs, *self._kernel.params):
            tensor.grad = None
        for x in self._kernel.inputs:
            if x.is_floating_point():
                x.detach().mul_(1.0)

    def forward(self) -> None:
        """Compute the results."""
        with self._autocast:
            self._roots = self._kernel.forward()

    @property
    def goes_back(self) -> bool:
        """The results have gradients."""
        return any(y.requires_grad for y in self._roots)

    def make_gradients(self) -> None:
        """Make gradients of the results, as the next layer would have just made them."""
        self._roots = [y for y in self._roots if y.requires_grad]
        self._gradients = [torch.full_like(y, 1e-3) for y in self._roots]

    def backward_of_inputs(self) -> None:
        """Compute the gradients of the inputs alone; ``backward`` can follow."""
        torch.autograd.grad(self._roots, self._leaves, self._gradients, retain_graph=True, allow_unused=True)

    def backward(self) -> None:
        """Compute all gradients, and free what backward needed."""
        torch.autograd.backward(self._roots, self._gradients)
        self._roots, self._gradients = [], []


def _is_out_of_memory(error: Exception) -> bool:
    """Return whether memory was the problem; torch has no class of its own for that on the host."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _measurement(forward: Timing, data: Timing, joint: Timing, *, both: bool, trains: bool) -> Measurement:
    """Return the medians; what is not the gradient of the inputs is that of the parameters, so that the sum is joint's.

    Args:
        forward: of the forward pass.
        data: of the backward pass of the inputs alone.
        joint: of the whole backward pass.
        both: backward computes gradients of inputs and of parameters.
        trains: it computes gradients of parameters.
    """
    data_s = min(data.median_s, joint.median_s) if both else (0.0 if trains else joint.median_s)
    iqr_s = forward.iqr_s + joint.iqr_s
    return Measurement(forward.median_s, data_s, joint.median_s - data_s, iqr_s, forward.num_samples)


@contextlib.contextmanager
def products_in(precision: str) -> Iterator[None]:
    """Let convolutions and matrix products on CUDA compute fp32 in TF32, or not, for a while."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def time_keys(keys: Iterable[str], timer: LayerTimer, found: Found) -> None:
    """Time the layers behind ``LocalLayer.key`` one after the other.

    Args:
        keys: of the layers.
        timer: of this device.
        found: takes each as it is done; None: it has no kernel.
    """
    for key in keys:
        found(key, timer.time(PieceKey.of_text(key)))


def slowest_of(times: Sequence[Sequence[float]]) -> Measurement:
    """Return the measurement of the rank that takes longest: the others wait for it in a step.

    Args:
        times: of every rank the fields of ``Measurement`` in order.
    """
    forward_s, data_s, weight_s, iqr_s, repeats = max(times, key=lambda fields: sum(fields[:3]))
    return Measurement(forward_s, data_s, weight_s, iqr_s, int(repeats))
