"""Slices of brains with tumours, or images that stand for them.

`load(None)` gives scikit-learn's digits 3, 5 and 8, which come with the package; `load(FOLDER)` reads

- the figshare set of Cheng (2017): files NUMBER.mat with a struct `cjdata` (label 1 to 3, PID, image, ...), as MATLAB
  7.3 writes them (HDF5, needs h5py) or as older ones do;
- or folders of images: FOLDER/CLASS/*.png, .jpg, .bmp or .tif (needs pillow).
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.io import loadmat
from sklearn.datasets import load_digits
from torch.nn import functional

from planner.errors import UsageError

TUMOURS = ("meningioma", "glioma", "pituitary")
DIGITS = (3, 5, 8)
ENDINGS = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"}


@dataclass(frozen=True)
class Slices:
    """Images and what they show.

    Attributes:
        images: (N, 1, size, size), float32, from 0 to 1.
        labels: (N,), int64.
        patients: of each image; images of one patient are never in training and testing both.
        classes: names.
    """

    images: torch.Tensor
    labels: torch.Tensor
    patients: tuple[str, ...]
    classes: tuple[str, ...]


def load(folder=None, size=32):
    """Return images as squares of a size.

    Raises:
        FileNotFoundError: the folder has neither .mat files nor folders of images.
        UsageError: a file is not of the format; with its name and what is wrong.
    """
    if folder is None:
        return digits(size)
    folder = Path(folder)
    files = sorted((f for f in folder.rglob("*.mat") if f.stem.isdigit()), key=lambda f: int(f.stem))
    if files:
        found = [read_mat(file) for file in files]
        images = torch.cat([squared(image, size) for image, _, _ in found])
        labels = torch.tensor([label - 1 for _, label, _ in found])
        return Slices(images, labels, tuple(patient for _, _, patient in found), TUMOURS)
    classes = sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
    named = [(f, k) for k, name in enumerate(classes) for f in sorted((folder / name).rglob("*")) if is_image(f)]
    if not named:
        raise UsageError(f"{folder} has neither NUMBER.mat files nor folders of images: FOLDER/CLASS/*.png")
    images = torch.cat([squared(read_image(file), size) for file, _ in named])
    labels = torch.tensor([k for _, k in named])
    return Slices(images, labels, tuple(str(file) for file, _ in named), tuple(classes))


def digits(size):
    """Return the digits 3, 5 and 8 of scikit-learn; every image is a patient of its own."""
    found = load_digits()
    kept = np.isin(found.target, DIGITS)
    images = torch.cat([squared(image, size) for image in found.images[kept]])
    labels = torch.tensor([DIGITS.index(d) for d in found.target[kept]])
    return Slices(images, labels, tuple(map(str, range(len(labels)))), tuple(map(str, DIGITS)))


def split(data, test_share=0.2, seed=0):
    """Return which images are for training and for testing, as two tensors of indices: whole patients."""
    patients = sorted(set(data.patients))
    order = np.random.default_rng(seed).permutation(len(patients))
    tested = {patients[i] for i in order[: max(1, round(test_share * len(patients)))]}
    is_test = torch.tensor([patient in tested for patient in data.patients])
    return torch.nonzero(~is_test).flatten(), torch.nonzero(is_test).flatten()


def read_mat(file):
    """Return image (height, width), label (1 to 3) and patient of a file of the figshare set."""
    with file.open("rb") as opened:
        is_hdf5 = b"MATLAB 7.3" in opened.read(128)
    try:
        image, label, patient = _from_hdf5(file) if is_hdf5 else _from_mat(file)
    except (KeyError, IndexError, ValueError, OSError) as error:
        raise UsageError(f"{file}: no struct cjdata with label, PID and image ({error})") from error
    if label not in {1, 2, 3}:
        raise UsageError(f"{file}: the label is {label}; 1, 2 and 3 are {', '.join(TUMOURS)}")
    if image.ndim != 2:
        raise UsageError(f"{file}: the image has the shape {image.shape}; one slice was expected")
    return image, label, patient


def _from_hdf5(file):
    import h5py

    with h5py.File(file) as opened:
        data = opened["cjdata"]
        image = np.asarray(data["image"]).T  # MATLAB writes columns first
        return image, int(np.asarray(data["label"]).flat[0]), "".join(map(chr, np.asarray(data["PID"]).flat))


def _from_mat(file):
    data = loadmat(file)["cjdata"][0, 0]
    return np.asarray(data["image"]), int(data["label"].flat[0]), str(data["PID"].flat[0])


def is_image(file):
    return file.suffix.lower() in ENDINGS


def read_image(file):
    """Return an image in shades of grey, (height, width)."""
    from PIL import Image

    with Image.open(file) as opened:
        return np.asarray(opened.convert("L"))


def squared(image, size):
    """Return an image as (1, 1, size, size) from 0 to 1, its brightest point at 1."""
    x = torch.from_numpy(np.ascontiguousarray(image, dtype=np.float32))[None, None]
    x = functional.interpolate(x, (size, size), mode="bilinear", antialias=True, align_corners=False)
    return x.clamp(min=0) / x.amax().clamp(min=1e-6)
