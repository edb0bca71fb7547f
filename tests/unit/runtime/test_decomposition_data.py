"""The example's data: a folder of the user's own images, digits, and volumes where nilearn is installed."""

from pathlib import Path

import numpy as np
import pytest
import torch

from examples.domain_decomposition.data import CUBE, load
from planner.errors import UsageError


def test_a_folder_of_images_gets_a_class_for_each_of_its_folders(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    for label, (name, brightness) in enumerate((("a", 40), ("b", 200))):
        (tmp_path / name).mkdir()
        for index in range(5 + label):
            pixels = np.full((6, 9, 3), brightness + index, dtype=np.uint8)
            image.fromarray(pixels).save(tmp_path / name / f"{index}.png")
    (tmp_path / "a" / "notes.txt").write_text("no image")
    data = load(str(tmp_path), 4)
    assert (data.classes, data.input_shape) == (2, (3, 4, 4))
    inputs = torch.cat([data.train.inputs, data.test.inputs])
    labels = torch.cat([data.train.labels, data.test.labels])
    assert torch.bincount(labels).tolist() == [5, 6]
    assert len(data.test.labels) == 3  # every fifth of 11
    assert torch.equal((inputs.mean((1, 2, 3)) > 0.5).long(), labels)
    expected = sorted([40 + i for i in range(5)] + [200 + i for i in range(6)])
    assert sorted((inputs[:, 0, 0, 0] * 255).round().int().tolist()) == expected


def test_what_is_no_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="neither digits nor brain nor a folder"):
        load(str(tmp_path / "none"), 4)
    (tmp_path / "only").mkdir()
    with pytest.raises(UsageError, match="a folder with images for each class, at least 2; it has 1"):
        load(str(tmp_path), 4)


def test_digits_are_enlarged_and_split() -> None:
    data = load("digits", 16)
    assert data.input_shape == (1, 16, 16)
    assert (len(data.train.labels), len(data.test.labels)) == (1437, 360)
    assert 0 <= float(data.train.inputs.min()) < float(data.train.inputs.max()) <= 1


@pytest.mark.slow
def test_cubes_of_the_brain_have_the_tissue_that_most_of_them_is() -> None:
    pytest.importorskip("nilearn", reason="the brain comes with nilearn: pip install 'layerwise[volumes]'")
    data = load("brain", 0)
    assert data.input_shape == (1, CUBE, CUBE, CUBE)
    assert min(len(data.train.labels), len(data.test.labels)) > 500
    for samples in (data.train, data.test):
        brightness = samples.inputs.mean((1, 2, 3, 4))
        means = [float(brightness[samples.labels == label].mean()) for label in range(data.classes)]
        assert means == sorted(means)  # in a T1 image fluid is dark, grey matter grey, white matter bright
