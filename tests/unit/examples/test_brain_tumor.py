"""The example of Habib & Qureshi: NNLU against its formulas, the network's shapes, loaders on files made here."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.io import savemat
from torch import nn

from examples.brain_tumor.data import TUMOURS, digits, load, read_mat, split
from examples.brain_tumor.network import tumor_net
from examples.brain_tumor.nnlu import NNLU, curvature, slope
from planner.errors import UsageError
from planner.frontend.lower import trace_layers
from planner.frontend.trace import empty_inputs
from planner.ir.ops import Conv, Linear, Pool
from planner.ir.tensor import DType
from planner.plan.schema import InputTensor

POINTS = torch.linspace(-4, 4, 41, dtype=torch.float64)


# --- NNLU


@pytest.mark.parametrize("alpha", [0.2, 0.333, 0.5, 1.0, 2.0])
def test_autograd_gives_equations_1_2_and_3_with_its_sign_corrected(alpha: float) -> None:
    x = POINTS.clone().requires_grad_()
    u = NNLU(alpha)(x)
    (first,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    for point, value in zip(POINTS.tolist(), u.tolist(), strict=True):
        assert value == pytest.approx(math.exp(-(point**2) / (4 * alpha)) / (2 * math.sqrt(math.pi * alpha)), rel=1e-12)
    torch.testing.assert_close(first.detach(), slope(POINTS, alpha), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(second, curvature(POINTS, alpha), rtol=1e-10, atol=1e-14)
    assert second[20] < 0 < -second[20]  # at 0, where eq. 3 as printed is positive: u has its maximum there
    assert torch.autograd.gradcheck(NNLU(alpha), (x,))


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_it_is_the_heat_kernel(alpha: float) -> None:
    def u(x: float, a: float = alpha) -> float:
        return float(NNLU(a)(torch.tensor(x, dtype=torch.float64)))

    assert quad(u, -20, 20)[0] == pytest.approx(1, abs=1e-9)
    assert quad(lambda x: x * x * u(x), -20, 20)[0] == pytest.approx(2 * alpha, abs=1e-8)
    step = 1e-5
    for x in (0.0, 0.7, -1.9):
        in_time = (u(x, alpha + step) - u(x, alpha - step)) / (2 * step)
        assert in_time == pytest.approx(float(curvature(torch.tensor(x, dtype=torch.float64), alpha)), rel=1e-6)


def test_no_time_no_kernel() -> None:
    with pytest.raises(UsageError, match="positive time"):
        NNLU(0.0)


# --- network


def test_the_printed_sizes_and_kernels() -> None:
    with torch.device("meta"):
        net = tumor_net()
        sizes = {}
        for name, part in net.named_modules():
            part.register_forward_hook(lambda _m, _x, y, name=name: sizes.update({name: tuple(y.shape[1:])}))
        net(torch.empty(1, 3, 224, 224))
    printed = {
        "conv1": (64, 224), "pool1": (64, 112), "conv2": (256, 112), "pool2": (256, 56), "conv3": (256, 56),
        "conv4": (256, 56), "conv5": (4096, 56), "pool3": (4096, 28), "conv6": (4096, 28), "pool4": (4096, 14),
    }  # fmt: skip
    for name, (channels, size) in printed.items():
        assert sizes[f"features.{name}"] == (channels, size, size)
    assert (sizes["gap"], sizes[""]) == ((4096, 1, 1), (3,))
    kernels = {n: tuple(m.weight.shape[1:]) for n, m in net.named_modules() if isinstance(m, nn.Conv2d)}
    assert kernels["features.conv6"] == (256, 6, 6)  # as printed, in 16 groups
    assert kernels["features.conv5"] == (256, 6, 6)
    assert sum(p.numel() for n, p in net.named_parameters() if "conv6.weight" in n) == 37_748_736


@pytest.mark.parametrize("gap", [False, True])
@pytest.mark.parametrize("activation", ["relu", "nnlu"])
def test_a_small_one_learns_its_batch_and_can_be_planned(activation: str, gap: bool) -> None:
    torch.manual_seed(0)
    net = tumor_net(width=1 / 64, image=16, channels=1, activation=activation, gap=gap, dropout=0.0)
    assert all(float(m.bias.detach().min()) == pytest.approx(0.1) for m in net.modules() if isinstance(m, nn.Linear))
    x, labels = torch.rand(6, 1, 16, 16), torch.arange(6) % 3
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x), labels)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    graph = traced(net, x)
    kinds = [type(layer.op) for layer in graph.layers]
    assert kinds.count(Conv) == 6 + gap
    assert kinds.count(Linear) == 2 - gap
    assert kinds.count(Pool) == 4
    assert len(kinds) <= 18  # activations belong to the layer in front of them


def traced(net: nn.Module, x: torch.Tensor) -> Any:
    inputs, _ = empty_inputs([InputTensor(name="input", shape=list(x.shape), dtype=DType.FLOAT32)])
    return trace_layers(net, inputs, "tumor-net").layers


def test_what_the_network_refuses() -> None:
    with pytest.raises(UsageError, match="multiple of 16"):
        tumor_net(image=100)
    with pytest.raises(UsageError, match="nnlu or relu"):
        tumor_net(activation="gelu")


# --- data


def picture(k: int, shape: tuple[int, int] = (20, 12)) -> np.ndarray:
    return np.random.default_rng(k).integers(0, 2000, shape).astype(np.int16)


def write_hdf5(file: Path, k: int, label: int, patient: str) -> None:
    """Write a file as MATLAB 7.3 does: HDF5 behind a header of 512 bytes, arrays with their columns first."""
    h5py = pytest.importorskip("h5py")
    with h5py.File(file, "w", userblock_size=512) as opened:
        data = opened.create_group("cjdata")
        data["image"] = picture(k).T
        data["label"] = np.array([[float(label)]])
        data["PID"] = np.array([[ord(c)] for c in patient], dtype=np.uint16)
        data["tumorMask"] = np.zeros((12, 20), dtype=np.uint8)
    with file.open("r+b") as opened:
        opened.write(b"MATLAB 7.3 MAT-file, Platform: GLNXA64, Created on: Mon Nov 21 2026".ljust(124))


def write_old(file: Path, k: int, label: int, patient: str) -> None:
    savemat(file, {"cjdata": {"image": picture(k), "label": label, "PID": patient}})


@pytest.mark.parametrize("write", [write_hdf5, write_old])
def test_both_forms_of_mat_files(tmp_path: Path, write: Any) -> None:
    for k, (label, patient) in enumerate([(1, "100360"), (2, "MR0402"), (3, "100360"), (1, "7")], start=1):
        write(tmp_path / f"{k}.mat", k, label, patient)
    (tmp_path / "cvind.mat").write_bytes(b"folds of a cross-validation, no image")
    image, label, patient = read_mat(tmp_path / "2.mat")
    np.testing.assert_array_equal(image, picture(2))
    assert (label, patient) == (2, "MR0402")
    found = load(tmp_path, 16)
    assert found.images.shape == (4, 1, 16, 16)
    assert found.labels.tolist() == [0, 1, 2, 0]
    assert found.patients == ("100360", "MR0402", "100360", "7")
    assert found.classes == TUMOURS
    assert found.images.amin() >= 0
    assert torch.all(found.images.amax((1, 2, 3)) <= 1)
    train, test = split(found, 0.3)
    assert sorted([*train.tolist(), *test.tolist()]) == [0, 1, 2, 3]
    assert not {found.patients[i] for i in train} & {found.patients[i] for i in test}


def test_mat_files_of_something_else_are_named(tmp_path: Path) -> None:
    savemat(tmp_path / "1.mat", {"other": 1})
    with pytest.raises(UsageError, match=r"1\.mat: no struct cjdata"):
        load(tmp_path)
    write_old(tmp_path / "1.mat", 1, 4, "a")
    with pytest.raises(UsageError, match="the label is 4; 1, 2 and 3 are meningioma"):
        load(tmp_path)


def test_folders_of_images(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    for k, name in enumerate(["glioma", "none"]):
        (tmp_path / name).mkdir()
        for i in range(2):
            image.fromarray(np.full((6, 8), 100 * k + i + 1, np.uint8)).save(tmp_path / name / f"{i}.png")
        (tmp_path / name / "notes.txt").write_text("no image")
    found = load(tmp_path, 16)
    assert found.images.shape == (4, 1, 16, 16)
    assert found.classes == ("glioma", "none")
    assert found.labels.tolist() == [0, 0, 1, 1]
    torch.testing.assert_close(found.images, torch.ones_like(found.images))  # the brightest point is 1
    with pytest.raises(UsageError, match=r"neither NUMBER\.mat files nor folders of images"):
        load(tmp_path / "glioma")


def test_digits_ship_with_the_package() -> None:
    found = digits(32)
    assert found.images.shape == (539, 1, 32, 32)
    assert found.labels.bincount().tolist() == [183, 182, 174]
    train, test = split(found)
    assert (len(train), len(test)) == (431, 108)
