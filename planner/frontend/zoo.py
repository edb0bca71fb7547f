"""Models of torchvision and timm by name; the only module that knows these libraries.

``torchvision:NAME`` and ``timm:NAME`` build a model with fresh weights, so nothing is ever
downloaded. A dotted path behind the name means a part of it: ``torchvision:fcn_resnet50.backbone``.

A detection model chooses boxes by their values between its parts, so only its parts can be planned.
``DETECTION_PARTS`` says which; their inputs are known. A part that reads a list of feature maps
takes them as one input each (``OfFeatures``).

torchvision from PyPI is made for CUDA. Beside a CPU build of torch it cannot load its own operators,
and its import fails where it describes two of them. ``_import_torchvision`` then declares these two
and imports again. Models need neither.
"""

import importlib
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Final

import torch
from torch import nn

from planner.errors import UnknownNameError, UsageError

Shape = tuple[int, ...]

LIBRARIES: Final = ("torchvision", "timm")
EXTRA: Final = "pip install 'layerwise[zoo]'"
_READ_FEATURES: Final = ("head", "rpn.head")  # forward(list of feature maps)
_READ_BOXES: Final = {f"roi_heads.{what}_head": f"{what}_roi_pool" for what in ("box", "mask", "keypoint")}
DETECTION_PARTS: Final = ("backbone", *_READ_FEATURES, *_READ_BOXES)
"""Those that a detection model has can be planned, each on its own; the batch of the last three is boxes."""

_LOADS_WEIGHTS: Final = ("checkpoint_path", "pretrained", "pretrained_backbone", "weights", "weights_backbone")
_DECLARED: Final = ("nms", "qnms")
_DECLARATIONS: list[torch.library.Library] = []  # the operators vanish with the object that declares them

# Sizes of torchvision's training recipes (references/ in its repository), by the module or folder of a model.
_SIDES: Final = {"inception": 299, "segmentation": 520}  # all others 224
_FRAMES: Final = (3, 368, 496)
_VIDEO: Final = (3, 16, 224, 224)
_VIDEOS: Final = {"resnet": (3, 16, 112, 112)}
_KEPT_DEFAULTS: Final[Mapping[str, Mapping[str, object]]] = {  # said aloud, they warn of no change to come
    "googlenet": {"init_weights": True},
    "inception_v3": {"init_weights": True},
}


@dataclass(frozen=True, slots=True)
class ZooModel:
    """A model of a library, or a part of it.

    Attributes:
        library: a name of ``LIBRARIES``.
        name: that the library knows.
        path: of the part in the model, with dots; empty for all of it.
        arguments: that it is built with.
        build: makes the whole model of these arguments with fresh weights, on torch's default device.
    """

    library: str
    name: str
    path: str
    arguments: Mapping[str, object]
    build: Callable[..., object]

    def part(self, whole: nn.Module) -> nn.Module:
        """Return the part of a model that was built.

        Raises:
            UsageError: there is no such part, or the whole can only be planned in parts.
        """
        reference, parts = f"{self.library}:{self.name}", _detection_parts(whole)
        if not self.path and parts:
            raise UsageError(
                f"{reference} is a detection model: it chooses boxes by their values in between, so it must be "
                f"planned as backbone and head apart: {', '.join(f'{reference}.{part}' for part in parts)}"
            )
        try:
            found = whole.get_submodule(self.path)
        except AttributeError as error:
            known = (name for name, _ in whole.named_modules() if name)
            raise UnknownNameError(f"part of {reference}", self.path, known) from error
        return OfFeatures(found) if parts and self.path in _READ_FEATURES else found

    def input_shapes(self, whole: Any) -> tuple[Shape, ...]:
        """Return the sizes of one sample of each input, without the batch; none where they are not known."""
        if self.library == "timm":
            return () if self.path else (_timm_image(whole, self.arguments),)
        kind, _, module = families(self.library)[self.name].rpartition(".")
        if kind == "detection":
            return self._detection_inputs(whole)
        if self.path not in {"", "backbone"}:
            return ()
        if kind == "optical_flow":
            return _FRAMES, _FRAMES
        if kind == "video":
            return (_VIDEOS.get(module, _VIDEO),)
        side = self.arguments.get("image_size", _SIDES.get(kind or module, 224))  # vision transformers take it
        return ((3, side, side),) if isinstance(side, int) else ()

    def _detection_inputs(self, whole: Any) -> tuple[Shape, ...]:
        """Return the input of the backbone, of a head that reads its feature maps, or of one that reads boxes."""
        if self.path == "backbone":
            return (_detection_image(whole),)
        if self.path in _READ_BOXES:
            pool = getattr(whole.roi_heads, _READ_BOXES[self.path])
            return ((whole.backbone.out_channels, *pool.output_size),)
        if self.path not in _READ_FEATURES:
            return ()
        with torch.device("meta"):
            model: Any = self.build(**self.arguments)  # whole may be real, and is not to run
            features = model.backbone.eval()(torch.empty(1, *_detection_image(whole)))
        return tuple(tuple(feature.shape[1:]) for feature in features.values())


class OfFeatures(nn.Module):
    """A head that reads a list of feature maps, as a module that takes each as an input."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, *features: torch.Tensor) -> Any:
        """Return what the head makes of the feature maps, finest first."""
        return self.head(list(features))


def find(reference: str, arguments: Mapping[str, object]) -> ZooModel:
    """Return the model that ``library:name`` or ``library:name.path.of.part`` means.

    Args:
        reference: the library is one of ``LIBRARIES``; timm's name may carry a tag, as in
            ``resnet50.a1_in1k``.
        arguments: that it will be built with.

    Raises:
        UnknownNameError: the library has no such model.
        UsageError: the library is missing, or the arguments ask for trained weights.
    """
    library, _, name = reference.partition(":")
    for argument in _LOADS_WEIGHTS:
        if argument in arguments:
            raise UsageError(
                f"model {reference!r}: {argument}= would load weights; a plan needs none. Load them into the module "
                "before you train it."
            )
    known = {*families(library), *(_timm().list_pretrained() if library == "timm" else ())}
    words = name.split(".")
    for count in range(len(words), 0, -1):  # names have dots themselves
        if (head := ".".join(words[:count])) in known:
            return ZooModel(library, head, ".".join(words[count:]), arguments, _builder(library, head))
    hint = f"`layerwise models '{library}:*'` lists all."
    raise UnknownNameError(f"{library} model", words[0], {n.partition(".")[0] for n in known}, hint)


def families(library: str) -> dict[str, str]:
    """Return every model of a library with the module that defines it, such as ``segmentation.fcn``.

    torchvision's quantized models are left out: they cannot be trained.

    Raises:
        UsageError: the library is missing.
    """
    if library == "timm":
        timm = _timm()
        return {name: module for module in timm.list_modules() for name in timm.list_models(module=module)}
    models = _torchvision().models
    names = models.list_models(exclude="quantized_*")
    return {name: models.get_model_builder(name).__module__.removeprefix("torchvision.models.") for name in names}


def _builder(library: str, name: str) -> Callable[..., object]:
    """Return the callable that makes a model without trained weights."""
    if library == "timm":
        timm = _timm()
        return lambda **arguments: timm.create_model(name, pretrained=False, **arguments)
    factory = _torchvision().models.get_model_builder(name)
    fixed = dict.fromkeys({"weights", "weights_backbone"} & set(inspect.signature(factory).parameters))
    kept = _KEPT_DEFAULTS.get(name, {})
    return lambda **arguments: factory(**{**kept, **arguments, **fixed})


def _detection_parts(whole: nn.Module) -> tuple[str, ...]:
    """Return the parts of a detection model that can be planned; none for other models."""
    if not type(whole).__module__.startswith("torchvision.models.detection."):
        return ()
    names = {name for name, _ in whole.named_modules()}
    return tuple(part for part in DETECTION_PARTS if part in names)


def _timm_image(whole: Any, arguments: Mapping[str, Any]) -> Shape:
    """Return the input that timm says a model was made for, as far as the arguments say no other."""
    channels, *image = whole.pretrained_cfg["input_size"]
    size = arguments.get("img_size", image)
    return arguments.get("in_chans", channels), *((size, size) if isinstance(size, int) else size)


def _detection_image(whole: Any) -> Shape:
    """Return the image that reaches the backbone; a square one of the shorter side where images are resized."""
    resize = whole.transform
    sides = resize.fixed_size or (resize.min_size[-1],) * 2
    return 3, *(math.ceil(side / resize.size_divisible) * resize.size_divisible for side in sides)


def _timm() -> ModuleType:
    _torchvision()  # timm imports it
    return _imported("timm", lambda: importlib.import_module("timm"))


def _torchvision() -> ModuleType:
    return _imported("torchvision", _import_torchvision)


def _imported(library: str, load: Callable[[], ModuleType]) -> ModuleType:
    try:
        return load()
    except ModuleNotFoundError as error:
        raise UsageError(
            f"models of {library} need the package {error.name!r}: {EXTRA} (or, where that would replace a CPU build "
            "of torch, pip install --no-deps torchvision timm)"
        ) from error
    except (ImportError, RuntimeError, OSError) as error:  # a torchvision that was made for another torch
        raise UsageError(
            f"cannot import {library}: {type(error).__name__}: {error}. Does it fit torch {torch.__version__}? {EXTRA}"
        ) from error


def _import_torchvision() -> ModuleType:
    """Import torchvision, with its operators declared where it cannot load its own.

    A failed import leaves three submodules behind that need no operator; the second one uses them.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
    declarations = torch.library.Library("torchvision", "FRAGMENT")
    for name in _DECLARED:
        if not hasattr(torch.ops.torchvision, name):
            declarations.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _DECLARATIONS.append(declarations)
    return importlib.import_module("torchvision")
