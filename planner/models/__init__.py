"""The networks of the papers, by name."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from types import MappingProxyType
from typing import Final

from torch import nn

from planner.errors import UnknownNameError, UsageError
from planner.models.alexnet import HYPAR, ONE_WEIRD_TRICK, alexnet
from planner.models.binary import binary_vgg
from planner.models.circulant import circulant_cnn
from planner.models.cosmoflow import cosmoflow
from planner.models.ct import ct_classifier
from planner.models.degraded import degraded_classifier
from planner.models.digits import digits_alexnet, digits_cnn
from planner.models.ecg import ecg_cnn, ecg_resnet
from planner.models.golf import golf_cnn, golf_inception, golf_resnet, golf_vgg
from planner.models.hypar import cifar_c, lenet_c, sconv, sfc
from planner.models.lenet import lenet5
from planner.models.pruned import pruned_lenet
from planner.models.resnet import BasicBlock, Bottleneck, cifar_resnet, imagenet_resnet
from planner.models.unet import unet
from planner.models.unet3d import unet3d
from planner.models.vessels import vessel_unet
from planner.models.vgg import vgg

__all__ = ["ENTRIES", "ModelEntry", "entry"]


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """A network that is known by name.

    Attributes:
        name: what the user types.
        build: returns the network with fresh weights; every one takes ``width`` and
            ``num_classes``, some take more.
        input_shape: of one sample, channels first.
        family: module of this package that it comes from.
        source: the paper that it is from.
        further_inputs: of one sample, where the network takes more than one input.
    """

    name: str
    build: Callable[..., nn.Module]
    input_shape: tuple[int, ...]
    family: str
    source: str
    further_inputs: tuple[tuple[int, ...], ...] = ()

    @property
    def input_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of one sample of every input, in order."""
        return self.input_shape, *self.further_inputs


_IMAGENET: Final = (3, 224, 224)
_CIFAR: Final = (3, 32, 32)
_MNIST: Final = (1, 32, 32)  # 28 x 28, padded
_MNIST_AS_IT_IS: Final = (1, 28, 28)
_DIGITS: Final = (1, 8, 8)
_MICROSCOPY: Final = (1, 512, 512)  # the ISBI cell images

_REDSHIFTS: Final = 4  # volumes of dark matter, in one tensor
_LIVER: Final = (1, 128, 128, 128)  # computed tomography
_CHEST: Final = (1, 64, 128, 128)  # the same
_BRAIN: Final = (1, 96, 96)  # patches of magnetic resonance angiograms
_HEARTBEAT: Final = (1, 260)
_HEART: Final = (1, 6000)  # 30 s at 200 Hz
_SWING: Final = (8, 512)  # of a golf club, eight sensors

_ACHARYA17: Final = "Acharya et al. 2017, Comput. Biol. Med. 89"
_BINARY16: Final = "Courbariaux et al. 2016, arXiv:1602.02830"
_CIRCNN17: Final = "after Ding et al. 2017, MICRO, arXiv:1708.08841"
_ENDO20: Final = "after Endo et al. 2020, Electronic Imaging"
_HAN15: Final = "Han et al. 2015, NIPS, arXiv:1506.02626"
_JIAO18: Final = "after Jiao et al. 2018, Int. J. Distrib. Sens. Netw. 14(10)"
_LIVNE19: Final = "Livne et al. 2019, Front. Neurosci. 13:97"
_RAJPURKAR17: Final = "Rajpurkar et al. 2017, arXiv:1707.01836"
_ZUNAIR20: Final = "Zunair et al. 2020, arXiv:2007.13224"
_OWT14: Final = "Krizhevsky 2014, arXiv:1404.5997"
_HYPAR19: Final = "Song et al. 2019, HPCA, arXiv:1901.02067"
_LENET98: Final = "LeCun et al. 1998, Proc. IEEE 86(11)"
_OYAMA20: Final = "Oyama et al. 2021, IEEE TPDS 32(7), arXiv:2007.12856"
_RESNET16: Final = "He et al. 2016, CVPR, arXiv:1512.03385"
_UNET15: Final = "Ronneberger et al. 2015, MICCAI, arXiv:1505.04597"
_VGG15: Final = "Simonyan and Zisserman 2015, ICLR, arXiv:1409.1556"
_OURS: Final = "this project"

_VGG_NAMES: Final = {"a": "vgg11", "b": "vgg13", "c": "vgg16-c", "d": "vgg16", "e": "vgg19"}


def _entries() -> Iterator[ModelEntry]:
    """Yield every network."""
    alexnet_owt = partial(alexnet, ONE_WEIRD_TRICK)
    alexnet_hypar = partial(alexnet, HYPAR, 2048)
    resnet18 = partial(imagenet_resnet, BasicBlock, (2, 2, 2, 2))
    resnet50 = partial(imagenet_resnet, Bottleneck, (3, 4, 6, 3))
    yield ModelEntry("alexnet", alexnet, _IMAGENET, "alexnet", f"{_OWT14}, as in torchvision")
    yield ModelEntry("alexnet-hypar", alexnet_hypar, _IMAGENET, "alexnet", _HYPAR19)
    yield ModelEntry("alexnet-owt", alexnet_owt, _IMAGENET, "alexnet", _OWT14)
    yield ModelEntry("cifar-c", cifar_c, _CIFAR, "hypar", _HYPAR19)
    yield ModelEntry("binary-vgg", binary_vgg, _CIFAR, "binary", _BINARY16)
    yield ModelEntry("circulant-cnn", circulant_cnn, _CIFAR, "circulant", _CIRCNN17)
    for size in (128, 256, 512):
        name = "cosmoflow" if size == 128 else f"cosmoflow-{size}"
        build = partial(cosmoflow, size=size)
        yield ModelEntry(name, build, (_REDSHIFTS, size, size, size), "cosmoflow", _OYAMA20)
    yield ModelEntry("ct-classifier", ct_classifier, _CHEST, "ct", _ZUNAIR20)
    yield ModelEntry("degraded-classifier", degraded_classifier, _CIFAR, "degraded", _ENDO20, ((1,),))
    yield ModelEntry("digits-alexnet", digits_alexnet, _DIGITS, "digits", _OURS)
    yield ModelEntry("digits-cnn", digits_cnn, _DIGITS, "digits", _OURS)
    yield ModelEntry("ecg-cnn", ecg_cnn, _HEARTBEAT, "ecg", _ACHARYA17)
    yield ModelEntry("ecg-resnet", ecg_resnet, _HEART, "ecg", _RAJPURKAR17)
    yield ModelEntry("golf-cnn", golf_cnn, _SWING, "golf", _JIAO18)
    yield ModelEntry("golf-inception", golf_inception, _SWING, "golf", _JIAO18)
    yield ModelEntry("golf-resnet", golf_resnet, _SWING, "golf", _JIAO18)
    yield ModelEntry("golf-vgg", golf_vgg, _SWING, "golf", _JIAO18)
    yield ModelEntry("lenet-c", lenet_c, _MNIST_AS_IT_IS, "hypar", _HYPAR19)
    yield ModelEntry("lenet5", lenet5, _MNIST, "lenet", _LENET98)
    yield ModelEntry("pruned-lenet", pruned_lenet, _MNIST_AS_IT_IS, "pruned", _HAN15)
    yield ModelEntry("resnet18", resnet18, _IMAGENET, "resnet", _RESNET16)
    yield ModelEntry("resnet50", resnet50, _IMAGENET, "resnet", _RESNET16)
    yield ModelEntry("sconv", sconv, _MNIST_AS_IT_IS, "hypar", _HYPAR19)
    yield ModelEntry("sfc", sfc, _MNIST_AS_IT_IS, "hypar", _HYPAR19)
    for depth in (20, 56, 110):
        build = partial(cifar_resnet, depth)
        yield ModelEntry(f"resnet{depth}", build, _CIFAR, "resnet", _RESNET16)
    yield ModelEntry("unet", unet, _MICROSCOPY, "unet", f"{_UNET15}, padded and with batch norm")
    yield ModelEntry("unet3d", unet3d, _LIVER, "unet3d", _OYAMA20)
    yield ModelEntry("vessel-unet", vessel_unet, _BRAIN, "vessels", _LIVNE19)
    for letter, name in _VGG_NAMES.items():
        yield ModelEntry(f"vgg-{letter}", partial(vgg, letter), _IMAGENET, "vgg", _VGG15)
        yield ModelEntry(name, partial(vgg, letter), _IMAGENET, "vgg", _VGG15)
        if letter != "c":  # not in torchvision
            build = partial(vgg, letter, batch_norm=True)
            yield ModelEntry(f"{name}_bn", build, _IMAGENET, "vgg", _VGG15)


ENTRIES: Final[Mapping[str, ModelEntry]] = MappingProxyType(
    {known.name: known for known in sorted(_entries(), key=attrgetter("name"))}
)


def entry(name: str) -> ModelEntry:
    """Return the network of this name.

    Raises:
        UnknownNameError: there is none; says the closest names and the other ways to give a model.
        UsageError: it is a file.
    """
    if name.endswith(".py"):
        raise UsageError(f"model {name!r} is a file: say which function of it returns the module, as {name}:FUNCTION")
    if name not in ENTRIES:
        hint = (
            "torchvision:NAME and timm:NAME are models of these libraries; "
            "a model of your own is package.module:callable or path/to/file.py:callable."
        )
        raise UnknownNameError("model", name, ENTRIES, hint)
    return ENTRIES[name]
