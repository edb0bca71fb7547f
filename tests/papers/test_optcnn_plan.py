"""What of OptCNN's plan of VGG-16 its cost gives on the shipped machine, and what it does not."""

import pytest

from planner.ir.dimension import Dimension
from planner.ir.split import Split
from planner.reproduce import optcnn

SIZES = {"gpu0": 2, "gpu1": 2}


@pytest.mark.parametrize(
    ("dimensions", "text"),
    [
        ((Dimension.SAMPLE, Dimension.SAMPLE), "n=4"),
        ((Dimension.WIDTH, Dimension.HEIGHT), "h=2 w=2"),
        ((Dimension.OUT_CHANNEL, Dimension.REPLICATE), "c=2"),
        ((Dimension.OUT_CHANNEL, Dimension.SAMPLE), "n=2 c=2"),
        ((Dimension.REPLICATE, Dimension.REPLICATE), "1"),
    ],
)
def test_splits_read_as_in_the_paper(dimensions: tuple[Dimension, ...], text: str) -> None:
    assert optcnn.text(Split(tuple(zip(SIZES, dimensions, strict=True))), SIZES) == text


def test_the_plan_has_the_papers_shape_where_a_roofline_can_tell() -> None:
    """Samples early, channels in FC1 and FC2; a cut of space and fewer devices cost a little more than the optimum."""
    figures = {figure.name: figure for figure in optcnn.plan_figures()}
    layers = {name: figure for name, figure in figures.items() if not name.startswith("cost")}
    assert len(layers) == 13 + 5 + 3
    for name, figure in layers.items():
        assert figure.is_equal is (name not in {"conv5_1", "conv5_2", "conv5_3", "pool5", "FC3"}), name
    assert layers["FC3"].ours == "c=4"
    assert layers["conv5_1"].ours == "n=4"
    ratios = [figure.ours for name, figure in figures.items() if name.startswith("cost")]
    assert all(isinstance(found, float) and 1 < found < 1.05 for found in ratios)
