"""A paper's figure beside ours."""

from dataclasses import dataclass

Value = float | str | None


@dataclass(frozen=True, slots=True)
class Figure:
    """One published quantity.

    Attributes:
        name: what it is, such as ``VGG-A, data parallel``.
        paper: the printed value; None where the paper prints none that we know.
        ours: computed here; a text for plans.
        unit: of both values, SI; empty for texts and ratios.
        digits: significant digits of the printed value, to which ours is rounded before it is called equal.
        remark: why the two differ, or what is not known.
    """

    name: str
    paper: Value
    ours: Value
    unit: str = ""
    digits: int = 3
    remark: str = ""


@dataclass(frozen=True, slots=True)
class Reproduction:
    """What a paper prints and what we get.

    Attributes:
        paper: key of the bibliography and title.
        command: that makes it, as ``layerwise reproduce hypar``.
        parts: headings with their figures, in the order of the paper.
        remarks: what is assumed, what is not known, what is not reproduced and why.
    """

    paper: str
    command: str
    parts: tuple[tuple[str, tuple[Figure, ...]], ...]
    remarks: tuple[str, ...] = ()
