"""CosmoFlow of 512^3 against the published figures [Oyama20]."""

import os

import pytest

from planner.ir.count import total_flop
from planner.reproduce.oyama import activation_bytes, planner_of, reproduce

FULL = bool(os.environ.get("LAYERWISE_FULL"))
VOLUMES = [  # channels and positions in each direction: input, convolutions and pools in turn
    (4, 512), (16, 512), (16, 256), (32, 256), (32, 128), (64, 128), (64, 64), (128, 32), (128, 16), (256, 16),
    (256, 8), (256, 8), (256, 4), (256, 4), (256, 2),
]  # fmt: skip


def test_size_and_work_are_those_of_the_paper() -> None:
    graph = planner_of(batch=4).traced.layers
    trained = {p.name: p.spec.numel for layer in graph.layers for p in layer.params if p.trainable}
    assert sum(trained.values()) == 9_437_636
    made = [channels * size**3 for channels, size in VOLUMES]
    assert activation_bytes(graph) == 2 * 4 * (sum(made) + sum(made[1::2]))  # leaky ReLUs behind the convolutions
    assert round(activation_bytes(graph) / 2**30, 1) == 48.7
    assert round((activation_bytes(graph) + 2 * 4 * made[0]) / 2**30, 1) == 52.7  # printed so
    forward, backward = total_flop(graph)
    assert forward / 4 / 2e9 == pytest.approx(592, rel=1e-3)  # GMAC of a sample
    assert backward == 2 * forward - 2 * 4 * 4 * 16 * 27 * 512**3  # the input of the first convolution has no gradient


@pytest.mark.slow
@pytest.mark.skipif(not FULL, reason="searches for 128 devices: LAYERWISE_FULL=1")
def test_a_step_on_128_gpus_fits_and_splits_samples_over_nodes_and_space_inside() -> None:
    (_, size), (_, step) = reproduce().parts
    assert [figure.is_equal for figure in size] == [True, False]
    rate, step_s, memory, splits = (figure.ours for figure in step)
    assert isinstance(rate, float)
    assert isinstance(step_s, float)
    assert isinstance(memory, float)
    assert memory <= 16e9
    assert rate <= 128 * 15.7e12
    assert rate > 171e12  # kernels as fast as data sheets promise
    assert str(splits).startswith("sample, ")
