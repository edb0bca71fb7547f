"""Every form of a MODEL argument, and every way in which one can be wrong."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from planner.errors import UnknownNameError, UsageError
from planner.frontend.source import LoadedModel, load_model

NETS = """
from __future__ import annotations
from dataclasses import dataclass
import torch
from torch import nn
import sibling_of_nets

@dataclass
class Options:
    features: int = 3

def net(features: int = 3) -> nn.Module:
    import sibling_of_nets
    return nn.Linear(features, 2)

net.input_shape = (3,)

class Shaped(nn.Linear):
    def __init__(self):
        super().__init__(4, 4)
        self.input_shape = [4]

class TwoInputs(nn.Identity):
    input_shapes = [(4,), (5, 6)]

class OtherMeaning(nn.Identity):
    input_shape = "NCHW"

def needs_values() -> nn.Module:
    return nn.Linear(3, int(torch.ones(1).item()))

def needs_weights() -> nn.Module:
    net = nn.Linear(3, 2)
    net.norm = float(net.weight.norm())
    return net

def broken() -> nn.Module:
    raise KeyError("no such layer")

def number() -> int:
    return 7

CONSTANT = 7
"""


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "sibling_of_nets.py").touch()
    (tmp_path / "typo.py").write_text("def net(:")
    path = tmp_path / "nets.py"
    path.write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "sibling_of_nets", raising=False)
    return path


def device(loaded: LoadedModel) -> str:
    return next(loaded.module.parameters()).device.type


def test_a_registered_name_takes_no_memory() -> None:
    loaded = load_model("vgg16")
    assert (loaded.name, loaded.source, loaded.input_shapes) == ("vgg16", "vgg16", ((3, 224, 224),))
    assert device(loaded) == "meta"


def test_a_registered_name_takes_arguments_and_a_device() -> None:
    loaded = load_model("lenet5", {"num_classes": 3, "width": 0.5}, device="cpu")
    assert device(loaded) == "cpu"
    assert loaded.module(torch.zeros(1, 1, 32, 32)).shape == (1, 3)


def test_a_callable_of_an_installed_module() -> None:
    loaded = load_model("torch.nn:Linear", {"in_features": 5, "out_features": 2})
    assert isinstance(loaded.module, nn.Linear)
    assert device(loaded) == "meta"
    assert (loaded.name, loaded.source, loaded.input_shapes) == ("Linear", "torch.nn:Linear", ())


def test_a_module_in_the_current_folder(nets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nets.rename(nets.with_name("only_in_this_folder.py"))
    try:
        assert load_model("only_in_this_folder:net").input_shapes == ((3,),)
    finally:
        monkeypatch.delitem(sys.modules, "only_in_this_folder")


def test_a_callable_of_a_file_with_siblings(nets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    path_before = list(sys.path)
    loaded = load_model(f"{nets}:net", {"features": 6})
    assert isinstance(loaded.module, nn.Linear)
    assert loaded.module.in_features == 6
    assert (loaded.name, loaded.source, loaded.input_shapes) == ("net", f"{nets}:net", ((3,),))
    assert sys.path == path_before
    assert "nets" not in sys.modules


def test_the_module_may_carry_the_input_shape(nets: Path) -> None:
    assert load_model(f"{nets}:Shaped").input_shapes == ((4,),)
    assert load_model(f"{nets}:TwoInputs").input_shapes == ((4,), (5, 6))
    assert load_model(f"{nets}:OtherMeaning").input_shapes == ()


@pytest.mark.usefixtures("nets")
def test_weights_are_made_only_where_a_callable_needs_them() -> None:
    assert device(load_model("nets.py:net")) == "meta"
    assert device(load_model("nets.py:needs_values")) == "meta"
    assert device(load_model("nets.py:needs_weights")) == "cpu"


def test_an_unknown_name_is_told_the_closest_ones_and_the_other_forms() -> None:
    forms = r"package\.module:callable or path/to/file\.py:callable"
    with pytest.raises(UnknownNameError, match=rf"unknown model 'alexnt'.*'alexnet'.*{forms}"):
        load_model("alexnt")


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("no_such_package.nets:net", "cannot import 'no_such_package.nets': ModuleNotFoundError"),
        ("typo.py:net", "cannot import 'typo.py': SyntaxError"),
        (":net", "cannot import '': ValueError"),
        ("missing.py:net", "there is no file 'missing.py'"),
        ("nets.py:nett", "'nets.py' has no 'nett'"),
        ("nets.py:", "'nets.py' has no ''"),
        ("torch.nn:Linnear", "'torch.nn' has no 'Linnear'"),
        ("nets.py:CONSTANT", "'CONSTANT' is a int, not a callable"),
        ("nets.py:number", "returned a int, not a torch.nn.Module"),
        ("nets.py:broken", r"called with \(\) raised KeyError: 'no such layer'"),
    ],
)
@pytest.mark.usefixtures("nets")
def test_what_cannot_be_loaded_says_why(reference: str, message: str) -> None:
    with pytest.raises(UsageError, match=rf"model '{reference}':? {message}"):
        load_model(reference)


def test_wrong_arguments_are_shown_with_their_cause() -> None:
    with pytest.raises(UsageError, match=r"'lenet5' called with \(depth=3\) raised TypeError") as raised:
        load_model("lenet5", {"depth": 3})
    assert isinstance(raised.value.__cause__, TypeError)
