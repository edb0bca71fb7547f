"""Which models ``coverage.py`` tries, and of what kind they are.

Every model of torchvision but the quantized ones, and of every family of timm (a module of
``timm.models``) some that are spread evenly over its names: more of large families, most of those
with convolutions. The choice depends on the version of timm only.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from planner.frontend import zoo

# Families of timm by what their blocks compute with; the first two are what this project is for. All others are
# transformers or made of fully connected layers.
CNNS = """
    byobnet convmixer convnext cspnet cspnext densenet dla dpn efficientnet fasternet ghostnet hardcorenas hgnet hrnet
    inception_next inception_resnet_v2 inception_v3 inception_v4 lcnetv2 mambaout mobilenetv3 nasnet nfnet pnasnet rdnet
    regnet repghost repvit res2net resnest resnet resnetv2 rexnet selecsls senet sknet starnet tresnet vgg vovnet
    xception xception_aligned
"""
HYBRIDS = """
    byoanet coat convit cpubone csatv2 edgenext efficientformer efficientformer_v2 efficientvim efficientvit_mit
    efficientvit_msra fastvit focalnet gcvit iformer levit lowformer maxxvit metaformer mobilenetv5 mobilevit nextvit
    shvit swiftformer tiny_vit visformer vision_transformer_hybrid vitamin
"""
SAMPLE = (
    "torchvision:mobilenet_v2", "torchvision:lraspp_mobilenet_v3_large", "torchvision:r3d_18", "torchvision:raft_small",
    "torchvision:ssdlite320_mobilenet_v3_large", "timm:resnet18", "timm:mobilevit_xxs", "timm:vit_tiny_patch16_224",
)  # fmt: skip
"""A handful: one of every kind."""

TRAINED = (
    "torchvision:alexnet", "torchvision:convnext_tiny", "torchvision:deeplabv3_mobilenet_v3_large",
    "torchvision:densenet121", "torchvision:efficientnet_b0", "torchvision:googlenet", "torchvision:inception_v3",
    "torchvision:lraspp_mobilenet_v3_large", "torchvision:mnasnet0_5", "torchvision:mobilenet_v2",
    "torchvision:mobilenet_v3_small", "torchvision:r3d_18", "torchvision:regnet_y_400mf", "torchvision:resnet18",
    "torchvision:shufflenet_v2_x0_5", "torchvision:squeezenet1_1", "timm:convmixer_768_32", "timm:cspresnet50",
    "timm:dla46_c", "timm:dpn68", "timm:ese_vovnet19b_slim_dw", "timm:edgenext_xx_small", "timm:efficientvit_b0",
    "timm:ghostnet_100", "timm:hgnetv2_b0", "timm:hrnet_w18_small", "timm:lcnet_050", "timm:mixnet_s",
    "timm:mobilevit_xxs", "timm:mobileone_s0", "timm:nf_regnet_b0", "timm:poolformer_s12", "timm:repvgg_a0",
    "timm:res2net50_26w_4s", "timm:resnest14d", "timm:resnetv2_50x1_bit", "timm:rexnet_100", "timm:skresnet18",
    "timm:starnet_s1", "timm:visformer_tiny",
)  # fmt: skip
"""What ``--training`` tries: of different families, those of few parameters."""
TRAINED_SAMPLE = ("torchvision:mobilenet_v3_small", "torchvision:shufflenet_v2_x0_5", "timm:lcnet_050")

_TORCHVISION_KINDS = {"optical_flow": "flow", "": "classification"}


@dataclass(frozen=True, slots=True)
class Case:
    """A model to try.

    Attributes:
        source: the library.
        family: module of the library that defines it.
        model: name in the library.
        kind: what it is for (torchvision), or what its blocks compute with (timm).
    """

    source: str
    family: str
    model: str
    kind: str

    @property
    def reference(self) -> str:
        """The MODEL argument."""
        return f"{self.source}:{self.model}"


def every_model() -> list[Case]:
    """Return all models of both libraries."""
    return [*_torchvision(), *_timm(zoo.families("timm"))]


def chosen_models() -> list[Case]:
    """Return every model of torchvision and some of every family of timm."""
    members: dict[str, list[str]] = {}
    for name, family in sorted(zoo.families("timm").items()):
        members.setdefault(family, []).append(name)
    chosen = {name: family for family, names in members.items() for name in spread(names, _quota(family, len(names)))}
    return [*_torchvision(), *_timm(chosen)]


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """Return so many items at even distances, the first one included; all where there are fewer."""
    count = min(count, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def _quota(family: str, size: int) -> int:
    """Return how many models of a family are tried."""
    match _kind(family):
        case "cnn":
            return 2 + math.ceil(size / 8)
        case "hybrid":
            return 2 + size // 12
        case _:
            return 1 + size // 24


def _kind(family: str) -> str:
    return "cnn" if family in CNNS.split() else "hybrid" if family in HYBRIDS.split() else "transformer"


def _torchvision() -> Iterator[Case]:
    for name, family in sorted(zoo.families("torchvision").items()):
        folder = family.rpartition(".")[0]
        yield Case("torchvision", family, name, _TORCHVISION_KINDS.get(folder, folder))


def _timm(families: Mapping[str, str]) -> Iterator[Case]:
    for name, family in sorted(families.items()):
        yield Case("timm", family, name, _kind(family))
