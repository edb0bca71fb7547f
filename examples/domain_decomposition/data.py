"""Real images and volumes: scikit-learn's digits, a brain that comes with nilearn, or a folder of the user's own."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

from planner.errors import UsageError
from runtime.decomposition import Samples

TEST_SHARE = 5
"""Every fifth sample is for testing, where the source has no other way to keep the two apart."""
CUBE, STRIDE = 16, 8
"""Voxels of a side of a volume, and between two of them."""
TISSUES = ("fluid or outside", "grey matter", "white matter")


@dataclass(frozen=True)
class Data:
    """Samples for training and testing."""

    name: str
    train: Samples
    test: Samples
    classes: int

    @property
    def input_shape(self) -> tuple[int, ...]:
        return tuple(self.train.inputs.shape[1:])


def load(name: str, size: int) -> Data:
    """Return the data of this name, or of a folder.

    Args:
        name: digits, brain, or a folder with a folder of images for each class.
        size: images are resized to it, height and width; volumes are what they are.
    """
    if name == "digits":
        return digits(size)
    if name == "brain":
        return brain()
    return images(Path(name), size)


def digits(size: int) -> Data:
    """Return scikit-learn's 1,797 hand-written digits of 8 x 8 pixels, enlarged."""
    from sklearn.datasets import load_digits

    found = load_digits()
    pictures = torch.tensor(found.images / 16, dtype=torch.float32).unsqueeze(1)
    return _split("digits", _resized(pictures, size), torch.tensor(found.target), 10)


def brain() -> Data:
    """Return cubes of 16 voxels out of a brain, with the tissue that most of the cube is.

    The MNI ICBM 152 template, an average of 152 people at 1 mm, comes with nilearn together with maps of grey and white
    matter. Training cubes come from the back of the head, test cubes from the front, so that none share a voxel.
    """
    try:
        import nibabel
        from nilearn import datasets
    except ModuleNotFoundError as error:
        raise UsageError(
            f"the brain comes with nilearn: pip install 'layerwise[volumes]' ({error.name} is missing)"
        ) from error
    folder = Path(datasets.__file__).parent / "data"
    names = ("t1", "gm", "wm")
    files = [folder / f"mni_icbm152_{name}_tal_nlin_sym_09a_converted.nii.gz" for name in names]
    anatomy, grey, white = (_volume(nibabel.load(file)) for file in files)
    maps = np.stack([1 - np.clip(grey + white, 0, 1), grey, white])
    cubes, tissues, fronts = [], [], []
    middle = anatomy.shape[1] // 2
    for corner in np.ndindex(*(1 + (side - CUBE) // STRIDE for side in anatomy.shape)):
        x, y, z = (STRIDE * c for c in corner)
        part = (slice(x, x + CUBE), slice(y, y + CUBE), slice(z, z + CUBE))
        if y < middle < y + CUBE or np.mean(anatomy[part] > 0) < 0.5:
            continue
        cubes.append(anatomy[part])
        tissues.append(int(maps[(slice(None), *part)].mean((1, 2, 3)).argmax()))
        fronts.append(y >= middle)
    inputs = torch.tensor(np.stack(cubes), dtype=torch.float32).unsqueeze(1)
    labels, is_test = torch.tensor(tissues), torch.tensor(fronts)
    train, test = (Samples(inputs[chosen], labels[chosen]) for chosen in (~is_test, is_test))
    return Data("brain", train, test, len(TISSUES))


def _volume(image) -> np.ndarray:
    """Return the voxels of an image, from 0 to 1."""
    found = np.asarray(image.dataobj, dtype=np.float32)
    return found / found.max()


def images(folder: Path, size: int) -> Data:
    """Return the images of a folder that has a folder of them for each class."""
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise UsageError("reading images needs pillow: pip install pillow") from error
    if not folder.is_dir():
        raise UsageError(f"data {str(folder)!r} is neither digits nor brain nor a folder with a folder for each class")
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    suffixes = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".pgm", ".ppm"}
    files = [(f, i) for i, c in enumerate(classes) for f in sorted(c.rglob("*")) if f.suffix.lower() in suffixes]
    if len({label for _, label in files}) != len(classes) or len(classes) < 2:
        raise UsageError(
            f"{str(folder)!r} needs a folder with images for each class, at least 2; it has {len(classes)}"
        )
    pictures = []
    for file, _ in files:
        with Image.open(file) as picture:
            pixels = np.asarray(picture.convert("RGB").resize((size, size), Image.Resampling.BILINEAR))
        pictures.append(torch.from_numpy(pixels.copy()).permute(2, 0, 1))
    shuffled = torch.randperm(len(files), generator=torch.Generator().manual_seed(0))
    inputs = torch.stack(pictures).float().div(255)[shuffled]
    return _split(folder.name, inputs, torch.tensor([label for _, label in files])[shuffled], len(classes))


def _resized(pictures: torch.Tensor, size: int) -> torch.Tensor:
    return functional.interpolate(pictures, size=(size, size), mode="bilinear", align_corners=False)


def _split(name: str, inputs: torch.Tensor, labels: torch.Tensor, classes: int) -> Data:
    is_test = torch.arange(len(labels)) % TEST_SHARE == 0
    return Data(name, Samples(inputs[~is_test], labels[~is_test]), Samples(inputs[is_test], labels[is_test]), classes)
