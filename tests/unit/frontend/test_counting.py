"""What the layers of a traced model compute and keep, held against torch's counter, published figures, real runs."""

import importlib
import importlib.util
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, bmm_flop, conv_backward_flop, mm_flop

from planner.frontend import zoo
from planner.frontend.calls import Call
from planner.frontend.counting import flop_of
from planner.frontend.custom import register_module
from planner.frontend.lower import trace_layers
from planner.frontend.source import load_model
from planner.ir.count import total_flop
from planner.ir.graph import LayerGraph
from planner.models import ENTRIES, entry
from planner.models.circulant import CirculantConv2d, CirculantLinear
from support.networks import NETWORKS

FULL = bool(os.environ.get("LAYERWISE_FULL"))
BATCH = 2
Inputs = tuple[torch.Tensor, ...]
Keywords = Mapping[str, torch.Tensor]

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")


# ---- FLOP, against torch's counter


def corrected(*arguments: Any, out_val: Any) -> int:
    """Return torch's FLOP of a convolution's backward, with the groups that its weight's part forgets."""
    *operands, groups, (of_input, of_weight, _) = arguments
    formula: Any = conv_backward_flop  # torch wraps it: it takes tensors
    first = formula(*operands, groups, [of_input, False, False], out_val=out_val)
    second = formula(*operands, groups, [False, of_weight, False], out_val=out_val)
    return int(first + second // groups)


corrected._get_raw = True  # type: ignore[attr-defined]  # gets tensors, not shapes


def of_complex(formula: Any) -> Any:
    """Return torch's count of a product, four times as much where it is one of complex numbers."""

    def count(x: torch.Tensor, y: torch.Tensor, *_: Any, out_val: torch.Tensor) -> int:
        return int(formula(x, y, out_val=out_val)) * (4 if x.is_complex() else 1)

    count._get_raw = True  # type: ignore[attr-defined]  # gets tensors, not shapes
    return count


def transform(x: torch.Tensor, dims: list[int], *_: Any, out_val: torch.Tensor) -> int:
    """Return 5 n log2 n for every transform over n points, half of it where one side is real."""
    real = next((t for t in (x, out_val) if not t.is_complex()), None)
    points = math.prod((x if real is None else real).shape[d] for d in dims)
    others = (x if real is None else real).numel() // points
    return others * round(points * math.log2(points) * (5 if real is None else 2.5))


transform._get_raw = True  # type: ignore[attr-defined]  # see above
ATEN = torch.ops.aten
CORRECTED = {
    ATEN.convolution_backward: corrected, ATEN.bmm: of_complex(bmm_flop), ATEN.mm: of_complex(mm_flop),
    **dict.fromkeys((ATEN._fft_r2c, ATEN._fft_c2r, ATEN._fft_c2c), transform),
}  # fmt: skip
FORWARD = {name: formula for name, formula in CORRECTED.items() if name is not ATEN.convolution_backward}


def counted(module: nn.Module, inputs: Inputs, keywords: Keywords) -> tuple[int, int]:
    """Return torch's count of forward and backward FLOP."""
    with FlopCounterMode(display=False, custom_mapping=FORWARD) as forward:
        result = module(*inputs, **keywords)
    outputs = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor) and x.requires_grad]
    with FlopCounterMode(display=False, custom_mapping=CORRECTED) as backward:
        torch.autograd.backward(outputs, [torch.empty_like(x) for x in outputs])
    return forward.get_total_flops(), backward.get_total_flops()


def counted_on_meta(module: nn.Module, inputs: Inputs, keywords: Keywords) -> tuple[int, int]:
    """Return torch's count on meta tensors, whose operators are the same on every machine."""
    on_meta = {name: x.to("meta") for name, x in keywords.items()}
    with torch.device("meta"):
        return counted(module.to("meta"), tuple(x.to("meta") for x in inputs), on_meta)


def meta(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta")


SHIPPED = [
    "alexnet", "alexnet-owt", "binary-vgg", "circulant-cnn", "degraded-classifier", "digits-cnn", "lenet5",
    "pruned-lenet", "resnet18", "resnet20", "resnet50", "vgg11_bn",
]  # fmt: skip


@pytest.mark.parametrize("name", ENTRIES if FULL else SHIPPED)
def test_flop_of_the_shipped_models_are_torchs(name: str) -> None:
    with torch.device("meta"):
        module = entry(name).build()
    inputs = tuple(meta(BATCH, *shape) for shape in entry(name).input_shapes)
    expected = counted_on_meta(module, inputs, {})
    if name == "circulant-cnn":
        ahead, back = circulant_weights(module)
        expected = expected[0] - ahead, expected[1] - back
    assert total_flop(trace_layers(module, inputs).layers) == expected


def circulant_weights(module: nn.Module) -> tuple[int, int]:
    """Return the FLOP of the transforms of weights, which every rank makes and no layer counts."""
    weights = [part.weight for part in module.modules() if isinstance(part, CirculantConv2d | CirculantLinear)]
    ahead = sum(w.numel() // w.shape[2] * round(2.5 * w.shape[2] * math.log2(w.shape[2])) for w in weights)
    return ahead, 2 * ahead  # backward is a complex one


READS_VALUES = "cumulative norm"


@pytest.mark.parametrize("name", NETWORKS)
def test_flop_of_odd_networks_are_torchs(name: str) -> None:
    network = NETWORKS[name]
    inputs, keywords = network.example(network.batches[0])
    found = total_flop(trace_layers(network.module(), inputs, keywords=keywords).layers)
    count = counted if name == READS_VALUES else counted_on_meta
    assert found == count(network.module(), inputs, keywords)


LIBRARIES = [
    *(f"torchvision:{name}" for name in (
        "resnet50", "vgg16", "alexnet", "inception_v3", "mobilenet_v2", "efficientnet_b0", "convnext_tiny", "swin_t",
        "vit_b_16", "fcn_resnet50", "r3d_18",
    )),
    *(pytest.param(f"torchvision:{name}", marks=pytest.mark.slow) for name in ("densenet121", "maxvit_t")),
    *(f"timm:{name}" for name in (
        "botnet26t_256", "coatnet_0_rw_224", "nfnet_l0", "mobilevit_s", "hrnet_w18_small", "eva02_tiny_patch14_224",
    )),
]  # fmt: skip


@pytest.mark.zoo
@pytest.mark.parametrize("name", LIBRARIES)
def test_flop_of_models_of_the_libraries_are_torchs(name: str) -> None:
    loaded = load_model(name)
    inputs = tuple(meta(BATCH, *shape) for shape in loaded.input_shapes)
    found = total_flop(trace_layers(loaded.module, inputs).layers)
    assert found == counted_on_meta(loaded.module, inputs, {})


class Lowrank(nn.Module):
    """A module with a rule of its own: a product of weights, then one of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.ones(5, 3)), nn.Parameter(torch.ones(3, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.a @ self.b)


def test_products_of_weights_do_not_grow_with_the_batch() -> None:
    register_module(Lowrank)
    module = nn.Sequential(nn.Linear(8, 8), Lowrank())
    graph = trace_layers(module, (meta(4, 8),)).graph
    call = next(Call.of(node, module) for node in graph.nodes if node.target == "1")
    weights, batch = 2 * 5 * 3 * 8, 2 * 4 * 5 * 8
    assert flop_of(call, 4) == (weights + batch, 2 * weights + 2 * batch)
    assert flop_of(call, 8) == (weights + 2 * batch, 2 * weights + 4 * batch)


class Failing(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x @ weight

    @staticmethod
    def backward(*_: Any) -> Any:
        raise RuntimeError("this kernel needs a GPU")


class Kernel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = Failing.apply(x, self.weight)
        return found


def test_a_backward_that_fails_on_meta_counts_as_twice_the_forward() -> None:
    register_module(Kernel)
    assert total_flop(trace_layers(nn.Sequential(Kernel()), (meta(4, 8),)).layers) == (2 * 4 * 8 * 5, 4 * 4 * 8 * 5)


# ---- FLOP, against published figures


def gmac(name: str, side: int, arguments: Mapping[str, object] | None = None) -> float:
    loaded = load_model(f"torchvision:{name}", arguments or {})
    (shape,) = loaded.input_shapes
    x = meta(1, *shape[:-2], side, side)
    forward, _ = total_flop(trace_layers(loaded.module, (x,), training=False).layers)
    return forward / 2e9


def torchvisions() -> list[str]:
    """Return the names of all classifiers of torchvision, images and videos, where it is installed."""
    if importlib.util.find_spec("torchvision") is None:
        return []
    families = zoo.families("torchvision")
    return [name for name, family in families.items() if "." not in family or family.startswith("video.")]


HANDFUL = ["resnet50", "vgg16", "mobilenet_v2", "shufflenet_v2_x1_0", "swin_t", "vit_b_16", "r3d_18"]
AS_TRAINED = {"vit_h_14": {"image_size": 518}}
"""Arguments that the default weights of a model were trained with, beside the defaults."""


@pytest.mark.zoo
@pytest.mark.parametrize("name", torchvisions() if FULL else HANDFUL)
def test_flop_of_classifiers_are_those_that_torchvision_publishes(name: str) -> None:
    zoo.families("torchvision")  # imports it, wherever its own operators cannot be loaded too
    weights = importlib.import_module("torchvision.models").get_model_weights(name).DEFAULT
    size = weights.transforms.keywords["crop_size"]
    found = gmac(name, size if isinstance(size, int) else size[0], AS_TRAINED.get(name))
    published = weights.meta["_ops"]  # three decimals
    assert abs(found - published) <= max(0.00051, 1e-5 * published)


@pytest.mark.zoo
@pytest.mark.parametrize(
    ("name", "side", "reference"),
    [
        ("alexnet", 224, 0.714), ("vgg16", 224, 15.470), ("resnet50", 224, 4.089), ("inception_v3", 299, 5.713),
        ("densenet121", 224, 2.834), ("mobilenet_v2", 224, 0.301), ("efficientnet_b0", 224, 0.386),
    ],
)  # fmt: skip
def test_flop_of_the_papers_networks_are_those_of_the_design(name: str, side: int, reference: float) -> None:
    assert gmac(name, side) == pytest.approx(reference, abs=0.00051)


# ---- bytes that backward needs, against a real run


def kept_bytes(module: nn.Module, inputs: Inputs, keywords: Keywords) -> int:
    """Return the bytes that autograd keeps in a real forward pass, each storage once, parameters and buffers not."""
    state = {t.untyped_storage()._cdata for t in (*module.parameters(), *module.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage()._cdata not in state:
            kept[tensor.untyped_storage()._cdata] = tensor  # alive, so that no other gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        result = module(*inputs, **keywords)
    del result
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def saved_bytes(graph: LayerGraph) -> int:
    return sum(layer.saved_bytes for layer in graph.layers)


OF_TORCHVISION = [("densenet121", 64), ("mobilenet_v2", 64), ("convnext_tiny", 64)]
MORE = [("efficientnet_b0", 64), ("swin_t", 64), ("googlenet", 64), ("fcn_resnet50", 64), ("maxvit_t", 224)]
IMAGES = [
    ("alexnet", 64), ("resnet50", 64), ("vgg16", 64), ("vgg11_bn", 32),
    *(
        pytest.param(f"torchvision:{name}", side, marks=pytest.mark.zoo)
        for name, side in (*OF_TORCHVISION, *(MORE if FULL else ()))
    ),
    pytest.param("torchvision:vit_b_32", 224, marks=[pytest.mark.zoo]),
]  # fmt: skip


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small tensors gain nothing from more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("name", "side"), IMAGES)
def test_the_bytes_kept_are_those_of_a_real_run(name: str, side: int) -> None:
    loaded = load_model(name, device="cpu")
    inputs = (torch.randn(BATCH, 3, side, side),)
    found = saved_bytes(trace_layers(loaded.module, inputs).layers)
    assert found == pytest.approx(kept_bytes(loaded.module.train(), inputs, {}), rel=0.05)


DEVIATE = {
    "recurrent": "oneDNN keeps a work space of its own",
}


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.xfail(reason=DEVIATE[name])] if name in DEVIATE else [])
        for name in NETWORKS
    ],
)
def test_the_bytes_kept_grow_with_the_batch_as_in_a_real_run(name: str) -> None:
    network = NETWORKS[name]
    found, real = [], []
    for batch in network.batches:
        inputs, keywords = network.example(batch)
        found.append(saved_bytes(trace_layers(network.module(), inputs, keywords=keywords).layers))
        real.append(kept_bytes(network.module(), inputs, keywords))
    assert found[-1] - found[0] == pytest.approx(real[-1] - real[0], rel=0.05)
