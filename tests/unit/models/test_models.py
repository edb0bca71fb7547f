"""The reference networks against published parameter counts, shapes and torchvision's names."""

import pytest
import torch
from torch import fx, nn

from planner.errors import UnknownNameError
from planner.models import ENTRIES, entry

VGG11 = 132_863_336
VGG13 = 133_047_848
VGG16 = 138_357_544
VGG19 = 143_667_240
NUM_PARAMS = {
    "alexnet": 61_100_840,
    "alexnet-hypar": 16_630_440,
    "alexnet-owt": 61_838_248,
    "cifar-c": 145_578,
    "cosmoflow": 9_437_636,
    "digits-alexnet": 6_334_858,
    "digits-cnn": 66_154,
    "lenet-c": 431_080,
    "lenet5": 61_706,
    "resnet110": 1_730_714,
    "resnet18": 11_689_512,
    "resnet20": 272_474,
    "resnet50": 25_557_032,
    "resnet56": 855_770,
    "sconv": 100_630,
    "sfc": 140_746_762,
    "unet": 31_036_546,
    "unet3d": 19_069_955 - 1_728 - 2_336 + 4_672 + 896,  # one channel, not three; no biases in front of batch norms
    "vgg-a": VGG11,
    "vgg-b": VGG13,
    "vgg-c": 133_638_952,
    "vgg-d": VGG16,
    "vgg-e": VGG19,
    "vgg11": VGG11,
    "vgg11_bn": 132_868_840,
    "vgg13": VGG13,
    "vgg13_bn": 133_053_736,
    "vgg16": VGG16,
    "vgg16-c": 133_638_952,
    "vgg16_bn": 138_365_992,
    "vgg19": VGG19,
    "vgg19_bn": 143_678_248,
}
DENSE = {"unet": (512, 512), "unet3d": (32, 32, 32)}  # classes of pixels, not of images
SMALL = {"unet3d": (1, 32, 32, 32)}  # to be quick
WITHOUT_BIASES = {  # the weights that HyPar communicates
    "alexnet-hypar": 16_624_656,
    "cifar-c": 145_376,
    "lenet-c": 430_500,
    "sconv": 100_500,
    "sfc": 140_722_176,
    "vgg-a": 132_851_392,
    "vgg-b": 133_035_712,
    "vgg-c": 133_625_536,
    "vgg-d": 138_344_128,
    "vgg-e": 143_652_544,
}


def on_meta(name: str, **arguments: object) -> nn.Module:
    with torch.device("meta"):
        return entry(name).build(**arguments)


def test_the_registry_is_complete_and_sorted() -> None:
    assert list(ENTRIES) == sorted(NUM_PARAMS)
    assert all(name == known.name for name, known in ENTRIES.items())


def test_an_unknown_name_is_told_the_closest_ones_and_the_other_forms() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown model 'vgg15'.*'vgg1\d'.*file\.py:callab"):
        entry("vgg15")


@pytest.mark.parametrize("name", NUM_PARAMS)
def test_the_number_of_parameters_is_the_published_one(name: str) -> None:
    assert sum(parameter.numel() for parameter in on_meta(name).parameters()) == NUM_PARAMS[name]


@pytest.mark.parametrize("name", WITHOUT_BIASES)
def test_the_weights_without_biases_are_those_of_hypar(name: str) -> None:
    parameters = on_meta(name).parameters()
    assert sum(weight.numel() for weight in parameters if weight.ndim > 1) == WITHOUT_BIASES[name]


@pytest.mark.parametrize("name", NUM_PARAMS)
def test_a_narrow_network_keeps_its_layers_and_runs(name: str) -> None:
    narrow = entry(name).build(width=0.125, num_classes=3)
    assert list(narrow.state_dict()) == list(on_meta(name).state_dict())
    assert 20 * sum(map(torch.numel, narrow.parameters())) < NUM_PARAMS[name]
    logits = narrow(torch.ones(2, *SMALL.get(name, entry(name).input_shape)))
    assert logits.shape == (2, 3, *DENSE.get(name, ()))
    assert logits.isfinite().all()


@pytest.mark.parametrize("name", ["resnet18", "resnet20", "vgg16", "digits-cnn"])
def test_plain_fx_traces_it(name: str) -> None:
    graph = fx.symbolic_trace(on_meta(name)).graph
    assert {node.op for node in graph.nodes} <= {
        "placeholder",
        "call_module",
        "call_function",
        "output",
    }


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        (
            "alexnet",
            {
                "features.0.weight": (64, 3, 11, 11),
                "features.3.weight": (192, 64, 5, 5),
                "features.6.weight": (384, 192, 3, 3),
                "features.8.weight": (256, 384, 3, 3),
                "features.10.bias": (256,),
                "classifier.1.weight": (4096, 9216),
                "classifier.4.bias": (4096,),
                "classifier.6.weight": (1000, 4096),
            },
        ),
        (
            "vgg16",
            {
                "features.0.weight": (64, 3, 3, 3),
                "features.28.weight": (512, 512, 3, 3),
                "classifier.0.weight": (4096, 25088),
                "classifier.3.weight": (4096, 4096),
                "classifier.6.bias": (1000,),
            },
        ),
        (
            "vgg11_bn",
            {
                "features.1.running_var": (64,),
                "features.4.weight": (128, 64, 3, 3),
                "features.26.num_batches_tracked": (),
            },
        ),
        (
            "resnet18",
            {
                "conv1.weight": (64, 3, 7, 7),
                "bn1.running_mean": (64,),
                "layer1.0.conv2.weight": (64, 64, 3, 3),
                "layer2.0.downsample.0.weight": (128, 64, 1, 1),
                "layer4.1.bn2.bias": (512,),
                "fc.weight": (1000, 512),
            },
        ),
        (
            "resnet50",
            {
                "layer1.0.downsample.1.weight": (256,),
                "layer3.5.conv3.weight": (1024, 256, 1, 1),
                "layer4.0.conv2.weight": (512, 512, 3, 3),
                "fc.bias": (1000,),
            },
        ),
        ("resnet56", {"layer3.8.conv2.weight": (64, 64, 3, 3), "fc.weight": (10, 64)}),
    ],
)
def test_state_dict_names_are_torchvisions(name: str, shapes: dict[str, tuple[int, ...]]) -> None:
    state = on_meta(name).state_dict()
    assert {key: tuple(state[key].shape) for key in shapes} == shapes
