"""A paper's figure beside ours."""

from dataclasses import dataclass

Value = float | str | None


@dataclass(frozen=True, slots=True)
class Figure:
    """One published quantity.

    Attributes:
        name: what it is, such as ``VGG-A, data parallel``.
        paper: the printed value; None where the paper prints none that we know.
        ours: computed here; a text for plans; None where it cannot be computed, which the remark explains.
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

    @property
    def is_equal(self) -> bool | None:
        """Whether ours is the paper's, to the printed digits; None where one of them is missing."""
        if self.paper is None or self.ours is None:
            return None
        if isinstance(self.paper, str) or isinstance(self.ours, str):
            return self.paper == self.ours
        return f"{self.paper:.{self.digits - 1}e}" == f"{self.ours:.{self.digits - 1}e}"

    @property
    def relative(self) -> float | None:
        """How far ours is above the paper's, relative to the paper's; None where they are no numbers."""
        if not isinstance(self.paper, float | int) or not isinstance(self.ours, float | int) or not self.paper:
            return None
        return self.ours / self.paper - 1


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


def paragraphs(text: str) -> tuple[str, ...]:
    """Return the paragraphs of a text, each as one line: remarks as they are written in code."""
    return tuple(" ".join(part.split()) for part in text.strip().split("\n\n"))
