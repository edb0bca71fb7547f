"""Pieces of layers, profiles and fits that are made up, for tests of looking up and fitting."""

from collections.abc import Callable

from planner.ir.graph import Layer, Parameter
from planner.ir.ops import Conv
from planner.ir.split import LayerId
from planner.ir.tensor import DType, TensorSpec
from planner.profile.calibrated import BYTE_TERMS, FLOP_TERMS, FORM, CalibratedRoofline, ConditionFit, KindFit
from planner.profile.demand import SIZES, Phase, demands
from planner.profile.file import Entry, LayerKey
from planner.profile.key import LocalLayer, PieceKey


def conv(
    samples: int,
    in_channels: int = 32,
    out_channels: int = 64,
    size: int = 14,
    kernel: int = 3,
    stride: int = 1,
    groups: int = 1,
) -> PieceKey:
    """A convolution without bias on square images; odd kernels are padded to keep the size."""
    op = Conv(in_channels, out_channels, (kernel,) * 2, (stride,) * 2, (kernel // 2,) * 2, (1, 1), groups)
    after = (size + 2 * (kernel // 2) - kernel) // stride + 1
    return PieceKey(op, (), ((samples, in_channels, size, size),), (samples, out_channels, after, after), bias=False)


def local_conv(samples: int, out_channels: int = 64, size: int = 14, *, input_gradient: bool = True) -> LocalLayer:
    """The layer whose piece is ``conv(samples, ...)``, as a search asks for it: of a layer twice as wide."""
    op = Conv(32, 2 * out_channels, (3, 3), (1, 1), (1, 1), (1, 1))
    weight = Parameter("w", TensorSpec((2 * out_channels, 32, 3, 3), DType.FLOAT32), role="weight")
    output = TensorSpec((64, 2 * out_channels, size, size), DType.FLOAT32)
    layer = Layer(LayerId("conv"), op, (LayerId("x"),), output, (weight,))
    return LocalLayer(
        layer, ((samples, 32, size, size),), (samples, out_channels, size, size), ((out_channels, 32, 3, 3),),
        DType.FLOAT32, input_gradient,
    )  # fmt: skip


def fit_of(flop_per_s: float, launch_s: float = 1e-6, precision: str = "fp32") -> CalibratedRoofline:
    """A fit of convolutions at one rate, memory for nothing."""
    kind = KindFit(
        launch_s=launch_s, flop_per_s=flop_per_s, flop_powers=[0.0] * len(FLOP_TERMS), bytes_per_s=1e18,
        byte_powers=[0.0] * len(BYTE_TERMS), norm_bytes_per_s=1e18, synchronised_bytes_per_s=1e18,
        elementwise_bytes_per_s=1e18, fresh_bytes_per_s=1e18, low=[0.0] * len(SIZES), high=[50.0] * len(SIZES),
    )  # fmt: skip
    phases = {phase: {"conv": kind, "products": kind} for phase in Phase}
    condition = ConditionFit(precision=precision, memory_format="contiguous", phases=phases, residuals=[])
    return CalibratedRoofline(form=FORM, left_out="", conditions=[condition])


def entry(piece: PieceKey, times: tuple[float | None, float | None, float | None]) -> Entry:
    """An entry of a profile: forward, backward-data and backward-weight seconds."""
    forward_s, backward_data_s, backward_weight_s = times
    return Entry(
        layer=LayerKey.model_validate_json(piece.text), forward_s=forward_s, backward_data_s=backward_data_s,
        backward_weight_s=backward_weight_s, iqr_s=0.0, num_repeats=5,
    )  # fmt: skip


def timed(piece: PieceKey, seconds: Callable[[Phase, float, float], float]) -> Entry:
    """An entry whose times are a function of phase, FLOP and bytes."""
    found = {phase: seconds(phase, d.flop, d.num_bytes) for phase, d in demands(piece).items()}
    return entry(piece, tuple(found.get(phase, 0.0) for phase in Phase))  # type: ignore[arg-type]  # of three
