"""The reference networks against published parameter counts, shapes and torchvision's names."""

from itertools import pairwise

import pytest
import torch
from torch import fx, nn

from planner.errors import UnknownNameError
from planner.models import ENTRIES, entry

VGG11 = 132_863_336
VGG13 = 133_047_848
VGG16 = 138_357_544
VGG19 = 143_667_240
GOLF_HEAD = 128 * 128 + 128 + 128 * 4 + 4
ECG_CHANNELS = [64, *(64 * (1 + k // 4) for k in range(16))]
ECG_BLOCKS = [  # two convolutions of length 16, two batch norms but for the first block
    16 * b * (a + b) + 2 * b + 2 * b + (2 * a if k else 0) for k, (a, b) in enumerate(pairwise(ECG_CHANNELS))
]
NUM_PARAMS = {
    "alexnet": 61_100_840,
    "alexnet-hypar": 16_630_440,
    "alexnet-owt": 61_838_248,
    "binary-vgg": 14_022_016 + 2 * (128 + 128 + 256 + 256 + 512 + 512 + 1024 + 1024 + 10),  # weights; batch norms
    "cifar-c": 145_578,
    "circulant-cnn": 9 * 8 * (8 * 8 + 8 * 16 + 16 * 32) + 8 * 512 * 64 + 64 + 128 + 256 + 512 + 1_792 + 5_130,
    "cosmoflow": 9_437_636,
    "cosmoflow-256": 9_437_636,
    "cosmoflow-512": 9_437_636,
    "ct-classifier": 1_351_873 + 513,  # two classes, not one
    "degraded-classifier": 1_146_304 + 16_768 + 2_570,  # convolutions with batch norms; of the level; of the classes
    "digits-alexnet": 6_334_858,
    "digits-cnn": 66_154,
    "ecg-cnn": 19_805,
    "ecg-resnet": 1_216 + sum(ECG_BLOCKS) + 4_110,
    "golf-cnn": 3 * (8 * 32 + 32 * 64 + 64 * 128) + 448 + GOLF_HEAD,
    "golf-inception": 864 + 4_288 + 16_768 + GOLF_HEAD,
    "golf-resnet": 96_000 + 896 + 10_720 + GOLF_HEAD,  # main path; its batch norms; shortcuts
    "golf-vgg": 96_000 + 896 + GOLF_HEAD,
    "lenet-c": 431_080,
    "lenet5": 61_706,
    "pruned-lenet": 431_080,
    "resnet110": 1_730_714,
    "resnet18": 11_689_512,
    "resnet20": 272_474,
    "resnet50": 25_557_032,
    "resnet56": 855_770,
    "sconv": 100_630,
    "sfc": 140_746_762,
    "unet": 31_036_546,
    "unet3d": 19_069_955 - 1_728 - 2_336 + 4_672 + 896,  # one channel, not three; no biases in front of batch norms
    "vessel-unet": 31_377_793 + 65,  # two classes, not one
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
DENSE = {  # classes of pixels or positions, not of images
    "ecg-resnet": (23,), "unet": (512, 512), "unet3d": (32, 32, 32), "vessel-unet": (96, 96),
}  # fmt: skip
SMALL = {  # to be quick
    "cosmoflow-256": None, "cosmoflow-512": None, "ct-classifier": ((1, 46, 46, 46),),
    "unet3d": ((1, 32, 32, 32),),
}  # fmt: skip
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


PUBLISHED_WITH_ONE_CLASS = {"ct-classifier": 1_351_873, "vessel-unet": 31_377_793}


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


@pytest.mark.parametrize("name", PUBLISHED_WITH_ONE_CLASS)
def test_with_one_class_the_number_of_parameters_is_the_published_one(name: str) -> None:
    parameters = on_meta(name, num_classes=1).parameters()
    assert sum(parameter.numel() for parameter in parameters) == PUBLISHED_WITH_ONE_CLASS[name]


def test_pruned_weights_are_as_many_as_published() -> None:
    masks = dict(entry("pruned-lenet").build().named_buffers()).values()
    kept = [round(float(mask.mean()), 2) for mask in masks]
    assert kept == [0.66, 0.12, 0.08, 0.19]
    assert 33_000 < sum(float(mask.sum()) for mask in masks) < 37_000  # "36K" with biases


@pytest.mark.parametrize("name", WITHOUT_BIASES)
def test_the_weights_without_biases_are_those_of_hypar(name: str) -> None:
    parameters = on_meta(name).parameters()
    assert sum(weight.numel() for weight in parameters if weight.ndim > 1) == WITHOUT_BIASES[name]


@pytest.mark.parametrize("name", NUM_PARAMS)
def test_a_narrow_network_keeps_its_layers_and_runs(name: str) -> None:
    narrow = entry(name).build(width=0.125, num_classes=3)
    assert list(narrow.state_dict()) == list(on_meta(name).state_dict())
    assert 20 * sum(map(torch.numel, narrow.parameters())) < NUM_PARAMS[name]
    shapes = SMALL.get(name, entry(name).input_shapes)
    if shapes is None:
        return  # its layers are those of another one, which fits into memory
    logits = narrow(*(torch.ones(2, *shape) for shape in shapes))
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
