"""What a user pins, forbids and ties: texts, the splits that are left, and what is refused."""

import pytest

from planner.cost.model import CostModel, Settings
from planner.cost.table import CostTable
from planner.devices.library import cluster
from planner.errors import InfeasibleError, UsageError
from planner.ir.dimension import Dimension
from planner.ir.graph import Layer, LayerGraph, Parameter, share_transfers
from planner.ir.mesh import Mesh
from planner.ir.ops import Conv, Elementwise, Input, Output
from planner.ir.rules import InputOutput
from planner.ir.split import LayerId, Split
from planner.ir.tensor import TensorSpec
from planner.profile.roofline import Roofline
from planner.profile.table import ProfileTable
from planner.search.elimination import solve_dp
from planner.search.formulate import formulate
from planner.space.constraints import Constraints, leaders, texts
from planner.space.enumerate import enumerate_splits

MESH = Mesh.of(node=2, gpu=2)
PLAIN = frozenset({Dimension.SAMPLE, Dimension.OUT_CHANNEL, Dimension.IN_CHANNEL, Dimension.IN_CHANNEL_SCATTER})


def graph() -> LayerGraph:
    """Return two blocks of two convolutions with a residual addition each."""
    spec = TensorSpec((8, 8, 6, 6))
    layers = [Layer(LayerId("input"), Input(), (), spec)]
    for block in ("layer1", "layer2"):
        entry = layers[-1].id
        for i in range(2):
            name = LayerId(f"{block}.conv{i}")
            weight = Parameter(f"{name}.weight", TensorSpec((8, 8, 3, 3)), 0, 1, role="weight")
            layers.append(
                Layer(name, Conv(8, 8, (3, 3), (1, 1), (1, 1), (1, 1)), (layers[-1].id,), spec, (weight,))
            )  # fmt: skip
        layers.append(Layer(LayerId(f"{block}.add"), Elementwise("add"), (entry, layers[-1].id), spec))
    layers.append(Layer(LayerId("output"), Output(), (layers[-1].id,), spec))
    return share_transfers(LayerGraph("blocks", tuple(layers), 8))


def splits_of(constraints: Constraints, mesh: Mesh = MESH) -> dict[str, set[tuple[Dimension, ...]]]:
    space = enumerate_splits(graph(), mesh, InputOutput.PER_RANK, PLAIN, constraints)
    return {str(layer): {s.dimensions for s in own} for layer, own in space.splits.items()}


def test_without_constraints_nothing_changes() -> None:
    assert splits_of(Constraints()) == {
        str(layer): {s.dimensions for s in own}
        for layer, own in enumerate_splits(graph(), MESH, InputOutput.PER_RANK, PLAIN).splits.items()
    }


def test_a_pin_on_all_axes_leaves_one_split_and_touches_no_other_layer() -> None:
    free, found = splits_of(Constraints()), splits_of(Constraints.of(pin=["layer1.conv*=out_channel"]))
    assert found["layer1.conv0"] == found["layer1.conv1"] == {(Dimension.OUT_CHANNEL, Dimension.OUT_CHANNEL)}
    assert found["layer2.conv0"] == free["layer2.conv0"]


def test_a_pin_on_one_axis_leaves_the_others_free() -> None:
    free = splits_of(Constraints())["layer1.conv0"]
    found = splits_of(Constraints.of(pin=["layer1.conv0=gpu:sample"]))["layer1.conv0"]
    assert found == {pair for pair in free if pair[1] is Dimension.SAMPLE}


def test_a_pin_speaks_of_a_level_however_it_is_cut_and_says_nothing_where_it_is_not_used() -> None:
    constraints = Constraints.of(pin=["layer1.conv0=gpu:sample"])
    cut = splits_of(constraints, Mesh.of(node=2, gpu0=2, gpu1=2))["layer1.conv0"]
    assert {split[1:] for split in cut} == {(Dimension.SAMPLE, Dimension.SAMPLE)}
    assert {split[0] for split in cut} == {*PLAIN, Dimension.REPLICATE}
    one = Constraints.of(pin=["layer1.conv0=gpu1:sample"])
    assert {split[2] for split in splits_of(one, Mesh.of(node=2, gpu0=2, gpu1=2))["layer1.conv0"]} == {Dimension.SAMPLE}
    assert splits_of(constraints, Mesh.of(node=2)) == splits_of(Constraints(), Mesh.of(node=2))


def test_a_pin_of_a_part_of_a_level_is_not_kept_by_a_mesh_that_does_not_cut_it_so() -> None:
    constraints = Constraints.of(pin=["layer1.conv0=gpu0:sample,gpu1:out_channel"])
    found = splits_of(constraints, Mesh.of(gpu0=2, gpu1=2))["layer1.conv0"]
    assert found == {(Dimension.SAMPLE, Dimension.OUT_CHANNEL)}
    with pytest.raises(InfeasibleError, match=r"layer 'layer1\.conv0' .* has no legal split left by --pin"):
        splits_of(constraints, Mesh.of(gpu=4))
    assert splits_of(constraints, Mesh.of(node=2)) == splits_of(Constraints(), Mesh.of(node=2))  # no gpu to cut


def test_a_pin_may_name_a_dimension_that_is_not_allowed_elsewhere() -> None:
    found = splits_of(Constraints.of(pin=["layer1.conv0=gpu:height"]))
    assert found["layer1.conv0"] == {(d, Dimension.HEIGHT) for d in (*PLAIN, Dimension.REPLICATE)}
    assert not any(Dimension.HEIGHT in split for split in found["layer2.conv0"])


def test_redistribute_layers_follow_what_is_pinned() -> None:
    found = splits_of(Constraints.of(pin=["layer2.conv0=height"]))
    assert (Dimension.HEIGHT, Dimension.HEIGHT) in found["layer1.add:shared"]
    assert not any(Dimension.HEIGHT in split for split in splits_of(Constraints())["layer1.add:shared"])


def test_in_channel_is_either_of_its_forms() -> None:
    forms = {Dimension.IN_CHANNEL, Dimension.IN_CHANNEL_SCATTER}
    pinned = splits_of(Constraints.of(pin=["layer1.conv0=in_channel"]))["layer1.conv0"]
    assert pinned == {(a, b) for a in forms for b in forms}
    free = splits_of(Constraints())["layer1.conv0"]
    forbidden = splits_of(Constraints.of(forbid=["*conv*=in_channel,sample"]))["layer1.conv0"]
    assert forbidden == {split for split in free if not set(split) & {*forms, Dimension.SAMPLE}}


def test_a_pin_without_a_legal_split_names_the_layer_and_what_is_legal() -> None:
    with pytest.raises(InfeasibleError, match=r"'layer1.add' \(elementwise\).*gpu: sample, height, width, out_channel"):
        splits_of(Constraints.of(pin=["layer1.*=in_channel"]))
    everything = ",".join(d.value for d in (*PLAIN, Dimension.REPLICATE) if d is not Dimension.IN_CHANNEL_SCATTER)
    with pytest.raises(InfeasibleError, match=r"'layer1.conv0' \(conv\) has no legal split left"):
        splits_of(Constraints.of(forbid=[f"layer1.conv0={everything}"]))


@pytest.mark.parametrize(
    ("constraints", "message"),
    [
        (Constraints.of(pin=["conv=sample"]), r"--pin 'conv' matches none of the 6 layers of 'blocks'. Near: 'layer1"),
        (Constraints.of(forbid=["layer3.*=sample"]), r"--forbid 'layer3.\*' matches none"),
        (Constraints.of(tie=["layer9"]), "--tie 'layer9' matches none"),
        (Constraints.of(pin=["input=replicate"]), "'input' is pinned by --io"),
        (Constraints.of(pin=["*:shared=replicate"]), "shared' follows its neighbours"),
        (Constraints.of(pin=["*conv0=gpus:sample"]), "unknown mesh axis 'gpus'. Did you mean 'gpu'"),
        (Constraints.of(tie=["layer1.add"]), "joins nothing"),
    ],
)
def test_names_that_mean_nothing_are_refused(constraints: Constraints, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        constraints.refuse_unknown(graph(), [MESH], ["node", "gpu"])


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"pin": ["fc"]}, "--pin 'fc' is not a pattern of layers and what it means, such as fc"),
        ({"pin": ["=sample"]}, "is not a pattern"),
        ({"pin": ["fc=channel"]}, "unknown dimension 'channel'. Did you mean"),
        ({"pin": ["fc=gpu:sample,gpu:height"]}, "says twice"),
        ({"pin": ["fc=sample,gpu:height"]}, "says twice"),
        ({"pin": ["fc=:sample"]}, "names no axis"),
        ({"forbid": ["fc=broadcast"]}, "unknown dimension 'broadcast'"),
    ],
)
def test_texts_that_are_no_constraints_are_refused(asked: dict[str, list[str]], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Constraints.of(**asked)


def test_constraints_are_written_as_they_are_read() -> None:
    asked = {
        "pin": ["fc*=out_channel", "conv1=gpu:sample,node:height", "a=b=in_channel"],
        "forbid": ["conv*=sample,in_channel", "fc=in_channel_scatter"], "tie": ["layer1.*"],
    }  # fmt: skip
    constraints = Constraints.of(**asked)
    assert list(texts(constraints)) == [(kind, text) for kind, own in asked.items() for text in own]
    assert constraints
    assert not Constraints()


def test_a_tie_joins_what_has_the_same_legal_dimensions() -> None:
    constraints = Constraints.of(tie=["layer?.*"])
    convs = tuple(f"layer{b}.conv{i}" for b in (1, 2) for i in (0, 1))
    assert constraints.tied(graph()) == (convs, ("layer1.add", "layer2.add"))


def test_leaders_join_shared_parameters_and_ties() -> None:
    assert leaders([0, 1, 1, 3, 4], []) == (0, 1, 1, 3, 4)
    assert leaders([0, 1, 1, 3, 4], [[2, 3], [4, 0]]) == (0, 1, 1, 1, 0)


def test_tied_layers_take_one_split_and_the_optimum_is_that_of_all_strategies_that_do() -> None:
    net, machine = graph(), cluster("2x2-a100-eth10")
    mesh = machine.mesh()
    constraints = Constraints.of(tie=["*conv*"], pin=["*.add=sample"])
    dims = {Dimension.SAMPLE, Dimension.OUT_CHANNEL}
    space = enumerate_splits(net, mesh, InputOutput.PER_RANK, dims, constraints)
    model = CostModel.of(net, machine, mesh, ProfileTable("any", Roofline.of_data_sheet(1e13, 1e12)), Settings())
    table = CostTable.of(space, model)
    found = formulate(table)
    solution = solve_dp(found.problem)
    assert solution.choice is not None
    strategy = table.strategy(found.layer_choice(solution.choice))
    convs = [layer.id for layer in net.layers if isinstance(layer.op, Conv)]
    assert len({strategy[layer] for layer in convs}) == 1

    def cost_s(split: Split) -> float:
        """Return the best cost with this split of all convolutions, on a space where they have no other."""
        text = ",".join(f"{axis}:{dimension}" for axis, dimension in split.axes)
        pinned = Constraints.of(pin=["*.add=sample", f"*conv*={text}"])
        own = CostTable.of(enumerate_splits(net, mesh, InputOutput.PER_RANK, dims, pinned), model)
        return solve_dp(formulate(own).problem).cost_s

    assert solution.cost_s == pytest.approx(min(cost_s(split) for split in space.splits[convs[0]]))
