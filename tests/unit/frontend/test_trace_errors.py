"""What cannot be traced is refused with the user's line, the user's shapes and what to do."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from examples import own_cnn
from planner.errors import TraceError
from planner.frontend.lower import trace_layers

IMAGE = (4, 3, 16, 16)


class Refused(nn.Module):
    """A convolution and something behind it that is refused."""

    def __init__(self, rest: Callable[[torch.Tensor], object]) -> None:
        super().__init__()
        self.conv, self.rest = nn.Conv2d(3, 8, 3), rest

    def forward(self, x: torch.Tensor) -> object:
        return self.rest(self.conv(x))


def refusal(module: nn.Module, *shapes: tuple[int, ...], **keywords: tuple[int, ...]) -> str:
    """Return the message."""
    with pytest.raises(TraceError) as caught:
        trace_layers(
            module,
            tuple(torch.empty(shape) for shape in shapes),
            keywords={name: torch.empty(shape) for name, shape in keywords.items()},
        )
    return str(caught.value)


def line_of(comment: str) -> str:
    """Return ``file:line`` of the code of this file that ends with a comment."""
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    (number,) = [i for i, line in enumerate(lines, 1) if line.endswith(f"  # {comment}")]
    return f"{__file__}:{number}"


# ---- control flow on values


def early_exit(x: torch.Tensor) -> torch.Tensor:
    if x.softmax(1).max() > 0.9:  # the early exit
        return x
    return x * 2


def until_small(x: torch.Tensor) -> torch.Tensor:
    while x.norm() > 1:  # the loop
        x = x / 2
    return x


def count(x: torch.Tensor) -> torch.Tensor:
    return x * len([i for i in range(3) if x[0, 0, 0, 0].item() > i])  # the count


def clamped(x: torch.Tensor) -> torch.Tensor:
    return x.clamp(max=float(x.mean()))  # the clamp


def both(x: torch.Tensor) -> torch.Tensor:
    return x if x.min() > 0 and x.max() < 1 else x * 3  # the conjunction


def named(x: torch.Tensor) -> torch.Tensor:
    print(f"mean {x.mean().item():.3f}")  # the print
    return x


@pytest.mark.parametrize(
    ("rest", "comment"),
    [
        (early_exit, "the early exit"),
        (until_small, "the loop"),
        (count, "the count"),
        (clamped, "the clamp"),
        (both, "the conjunction"),
        (named, "the print"),
    ],
)
def test_control_flow_on_values_names_its_line_and_what_to_do(
    rest: Callable[[torch.Tensor], torch.Tensor], comment: str
) -> None:
    message = refusal(Refused(rest), IMAGE)
    assert message.startswith(line_of(comment))
    assert "value of a tensor" in message
    assert "backbone and head" in message
    assert re.search(r"\bleaf\b", message)


def test_control_flow_deep_inside_names_the_line_of_the_inner_module() -> None:
    inner = Refused(early_exit)
    assert refusal(nn.Sequential(nn.Conv2d(3, 3, 1), nn.Sequential(inner)), IMAGE).startswith(line_of("the early exit"))


def test_a_selection_by_values_has_no_known_size() -> None:
    message = refusal(Refused(lambda x: x[x > 0].sum()), IMAGE)  # the selection
    assert message.startswith(line_of("the selection"))


@pytest.mark.parametrize(
    "rest",
    [
        lambda x: torch.stack([x[i] * (i + 1) for i in range(x.shape[0])]),  # a loop
        lambda x: torch.stack([row.softmax(0) for row in x]),  # over samples
        lambda x: torch.cat([row[None] for row in x.unbind(0)]),  # in three spellings
    ],
)
def test_a_loop_over_samples_is_refused(rest: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Unrolled, it would be right for the traced batch only."""
    message = refusal(Refused(rest), IMAGE)
    assert message.startswith(f"{__file__}:{rest.__code__.co_firstlineno}")
    assert "sample" in message


# ---- shapes


def test_a_wrong_number_of_channels_shows_the_shapes_of_the_user() -> None:
    message = refusal(Refused(torch.relu), (4, 5, 16, 16))
    assert "(4, 5, 16, 16)" in message
    assert f"{__file__}:" in message
    assert "Refused" in message


@pytest.mark.parametrize("shape", [(4, 3, 16), (4, 3), (4, 3, 2, 2), (4, 3, 16, 16, 16)])
def test_a_wrong_number_of_dimensions_shows_the_shapes_of_the_user(shape: tuple[int, ...]) -> None:
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1))
    assert str(shape) in refusal(module, shape)


def test_an_image_of_the_wrong_size_shows_the_shapes_of_the_user() -> None:
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 14 * 14, 10))
    message = refusal(module, (4, 3, 20, 20))
    assert "(4, 3, 20, 20)" in message
    assert "10007" not in message  # sizes of our own would only confuse


class TwoImages(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 8, 3)

    def forward(self, left: torch.Tensor, right: torch.Tensor, scale: torch.Tensor | None = None) -> torch.Tensor:
        y = self.conv(torch.cat([left, right], 1))
        return y if scale is None else y * scale[:, None, None, None]


def test_two_inputs_of_shapes_that_do_not_fit_are_both_shown() -> None:
    message = refusal(TwoImages(), IMAGE, (4, 3, 12, 16))
    assert "(4, 3, 16, 16)" in message
    assert "(4, 3, 12, 16)" in message


def test_batches_that_differ_are_both_shown() -> None:
    message = refusal(TwoImages(), IMAGE, (5, 3, 16, 16))
    assert "(4, 3, 16, 16)" in message
    assert "(5, 3, 16, 16)" in message


def test_an_input_by_keyword_of_a_wrong_shape_is_shown() -> None:
    message = refusal(TwoImages(), IMAGE, IMAGE, scale=(4, 7))
    assert "(4, 7)" in message


# ---- arguments


def test_a_missing_input_names_all_inputs_and_the_given_shapes() -> None:
    message = refusal(TwoImages(), IMAGE)
    assert "left, right, scale" in message
    assert "1 were given" in message
    assert "(4, 3, 16, 16)" in message


def test_an_input_too_many_is_refused() -> None:
    assert "4 were given" in refusal(TwoImages(), IMAGE, IMAGE, (4,), (4,))


def test_an_unknown_keyword_is_named() -> None:
    message = refusal(TwoImages(), IMAGE, IMAGE, scales=(4,))
    assert "left, right, scale" in message
    assert "scales" in message


def test_an_input_given_twice_is_refused() -> None:
    assert "left" in refusal(TwoImages(), IMAGE, IMAGE, left=IMAGE)


def test_inputs_without_a_batch_are_refused() -> None:
    assert "batch" in refusal(Refused(torch.relu))
    assert "batch" in refusal(Refused(torch.relu), ())


# ---- outputs


@pytest.mark.parametrize("result", [None, (), {}, [], (None, [{}])], ids=str)
def test_no_tensor_output_is_refused(result: object) -> None:
    assert "output" in refusal(Refused(lambda _: result), IMAGE)


@pytest.mark.parametrize(
    ("structure", "shown"),
    [
        (lambda x: (x, 3), "3"),
        (lambda x: {"maps": x, "name": "conv"}, "'conv'"),
        (lambda x: [x, (x, 0.5)], "0.5"),
        (lambda x: (x, tuple(x.shape)), "output.1"),
        (lambda x: (x, x.dtype), "torch.float32"),
    ],
)
def test_an_output_that_is_no_tensor_is_shown_with_its_place(structure: Callable[[Any], object], shown: str) -> None:
    message = refusal(Refused(structure), IMAGE)
    assert shown in message
    assert "not a tensor" in message


# ---- the user's own mistakes


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.convolution(x)  # type: ignore[operator]  # the typing error


def test_a_mistake_in_forward_names_its_line() -> None:
    message = refusal(Broken(), IMAGE)
    assert message.startswith(line_of("the typing error"))
    assert "convolution" in message


def test_an_exception_of_the_user_is_shown_in_his_words() -> None:
    def rest(x: torch.Tensor) -> torch.Tensor:
        if x.shape[-1] != 32:
            raise ValueError("this network is made for images of 34 x 34")  # the check
        return x

    message = refusal(Refused(rest), IMAGE)
    assert message.startswith(line_of("the check"))
    assert "this network is made for images of 34 x 34" in message


def test_a_tensor_that_no_module_owns_is_refused() -> None:
    weight = torch.randn(8, 1, 1)
    message = refusal(Refused(lambda x: x * weight), IMAGE)
    assert message.startswith(f"{__file__}:")
    assert "buffer" in message


def test_errors_leave_torch_as_it_was() -> None:
    for rest in (early_exit, lambda x: x.view(3), lambda x: (x, 3)):
        refusal(Refused(rest), IMAGE)
        x = torch.randn(IMAGE)
        module = Refused(torch.relu)
        assert torch.equal(module(x), torch.relu(module.conv(x)))
        assert type(torch.zeros(1)) is torch.Tensor


def test_the_message_is_all_that_is_said(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
    """The second way to a graph logs long tracebacks of torch's own when it fails too."""
    refusal(Refused(lambda x: x[:, :3] * x[:, :4]), IMAGE)
    assert [record for record in caplog.records if record.levelname in {"WARNING", "ERROR"}] == []
    assert capfd.readouterr() == ("", "")


def test_the_graph_that_torch_prints_where_export_fails_too_is_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    said = refusal(own_cnn.build_model(), (4, 3, 32))
    assert "fails on inputs of shape (4, 3, 32)" in said
    assert capsys.readouterr() == ("", "")
