"""CNN-DNN training: independent of ranks, order and restarts; the coherent network is the CNN-DNN."""

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from planner.errors import RunError, UsageError
from planner.frontend.decomposition import assemble, decomposed, local_network
from runtime.decomposition import (
    Decomposition,
    Fitted,
    Recipe,
    Samples,
    Settings,
    averaged,
    fit,
    majority,
    train,
    train_local,
    transfer,
)
from support.decomposition import CLASSES, tiny_cnn, tiny_samples

SETTINGS = Settings(epochs=3, batch=16, seed=5)
RECIPE = Recipe(SETTINGS, Settings(epochs=2, batch=8), hidden=(6,))
CUT = Decomposition((1, 8, 8), (2, 2), 1)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def fitted() -> Fitted:
    torch.set_num_threads(1)
    return fit(tiny_cnn, CUT, tiny_samples(), RECIPE)


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name


def test_a_local_network_is_the_same_whatever_is_trained_before_it(fitted: Fitted) -> None:
    torch.manual_seed(99)
    for index in (3, 1):
        found = train_local(tiny_cnn, CUT, tiny_samples(), SETTINGS, index)
        assert_same(found.state, fitted.local[index].state)
        assert found.losses == fitted.local[index].losses
    starts = [each.losses[0] for each in fitted.local]
    assert len(set(starts)) == len(starts)  # every part has weights and data of its own
    assert all(each.losses[-1] < each.losses[0] for each in fitted.local)


def test_training_leaves_the_callers_generator_alone() -> None:
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    train_local(tiny_cnn, CUT, tiny_samples(), replace(SETTINGS, epochs=1), 0)
    assert torch.equal(torch.rand(1), expected)


def test_training_is_plain_sgd_with_momentum_on_the_parts() -> None:
    """Written out again for a network without anything random but its start and the order."""
    samples, cut = tiny_samples(), Decomposition((1, 8, 8), (1, 2), 2)
    starts: list[dict[str, torch.Tensor]] = []
    orders: list[torch.Tensor] = []

    def factory(shape: tuple[int, ...]) -> nn.Module:
        net = nn.Sequential(nn.Flatten(), nn.Linear(shape[1] * shape[2], CLASSES))
        starts.append({name: tensor.clone() for name, tensor in net.state_dict().items()})
        return net

    draw = torch.randperm

    def noted(count: int) -> torch.Tensor:
        orders.append(draw(count))
        return orders[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randperm", noted)
        found = train_local(factory, cut, samples, replace(SETTINGS, epochs=2), 1)
    weight, bias = starts[0]["1.weight"], starts[0]["1.bias"]
    speed = [torch.zeros_like(weight), torch.zeros_like(bias)]
    x = samples.inputs[:, 0, :, 2:].flatten(1)  # columns 4 to 7, and an overlap of 2
    assert len(orders) == 2
    for order in orders:
        for batch in (order[:16], order[16:32]):  # the 33rd sample is alone and left out
            shares = torch.softmax(x[batch] @ weight.T + bias, 1)
            error = (shares - nn.functional.one_hot(samples.labels[batch], CLASSES)) / len(batch)
            for value, gradient, v in zip((weight, bias), (error.T @ x[batch], error.sum(0)), speed, strict=True):
                v.mul_(0.9).add_(gradient)
                value.sub_(0.05 * v)
    assert torch.allclose(found.state["1.weight"], weight, atol=1e-6)
    assert torch.allclose(found.state["1.bias"], bias, atol=1e-6)


def test_the_coherent_network_with_transferred_weights_gives_the_outputs_of_the_cnn_dnn(fitted: Fitted) -> None:
    samples = tiny_samples()
    parts = []
    for index, trained in enumerate(fitted.local):
        net = local_network(tiny_cnn, CUT, index).eval()
        net.load_state_dict(trained.state)
        region = CUT.regions[index]
        rows, columns = map(slice, region.start, region.stop)
        with torch.no_grad():
            parts.append(torch.softmax(net(samples.inputs[:, :, rows, columns].contiguous()), 1))
    assert torch.equal(torch.cat(parts, 1), fitted.probabilities)
    coherent = decomposed(tiny_cnn, (1, 8, 8), (2, 2), 1, "6")
    transfer(coherent, [each.state for each in fitted.local], fitted.coarse.state)
    with torch.no_grad():
        expected = fitted.net.coarse(torch.cat(parts, 1))
        assert torch.equal(coherent.eval()(samples.inputs), expected)
        assert torch.equal(fitted.net(samples.inputs), expected)


def test_a_rank_trains_its_networks_while_no_other_rank_exists(
    fitted: Fitted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(RunError, match="could not join"):
        fit(tiny_cnn, CUT, tiny_samples(), RECIPE, folder=tmp_path, timeout_s=0.5)
    assert not dist.is_initialized()
    assert {path.name for path in tmp_path.iterdir()} == {"local-1.pt", "local-3.pt"}
    for index in (1, 3):
        assert_same(torch.load(tmp_path / f"local-{index}.pt", weights_only=True)["net"], fitted.local[index].state)


def test_training_goes_on_where_it_was_interrupted(fitted: Fitted, tmp_path: Path) -> None:
    calls = itertools.count()

    def dying(shape: tuple[int, ...]) -> nn.Module:
        net = tiny_cnn(shape)

        def count(module: nn.Module, _: object) -> None:
            if module.training and next(calls) == 3:  # 2 steps an epoch: in the second epoch of the first network
                raise InterruptedError

        net.register_forward_pre_hook(count)
        return net

    with pytest.raises(InterruptedError):
        fit(dying, CUT, tiny_samples(), RECIPE, folder=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["local-0.pt"]
    (tmp_path / ".local-0.pt.unfinished").write_bytes(b"cut off")
    again = fit(tiny_cnn, CUT, tiny_samples(), RECIPE, folder=tmp_path)
    for one, other in zip([*again.local, again.coarse], [*fitted.local, fitted.coarse], strict=True):
        assert_same(one.state, other.state)
        assert one.losses == other.losses
    longer = fit(tiny_cnn, CUT, tiny_samples(), replace(RECIPE, local=replace(SETTINGS, epochs=4)), folder=tmp_path)
    assert [each.losses[:3] for each in longer.local] == [each.losses for each in fitted.local]
    assert longer.coarse.losses != fitted.coarse.losses  # its inputs are others now: it was trained anew


def test_what_another_training_saved_is_refused(tmp_path: Path) -> None:
    one = replace(SETTINGS, epochs=1)
    train_local(tiny_cnn, CUT, tiny_samples(), one, 0, tmp_path)
    others = [
        (tiny_samples(count=20), one),
        (Samples(tiny_samples().inputs + 1, tiny_samples().labels), one),
        (tiny_samples(), replace(one, seed=6)),
        (tiny_samples(), replace(one, learning_rate=0.1)),
    ]
    for samples, settings in others:
        with pytest.raises(UsageError, match="other samples or settings"):
            train_local(tiny_cnn, CUT, samples, settings, 0, tmp_path)
    wider = lambda shape: nn.Sequential(tiny_cnn(shape), nn.Linear(CLASSES, CLASSES))  # noqa: E731
    with pytest.raises(UsageError, match="another network"):
        train_local(wider, CUT, tiny_samples(), one, 0, tmp_path)
    (tmp_path / "local-0.pt").write_bytes(b"nothing")
    with pytest.raises(UsageError, match="no saved training"):
        train_local(tiny_cnn, CUT, tiny_samples(), one, 0, tmp_path)


def test_average_and_majority_against_counting() -> None:
    shares = torch.rand(200, 4, CLASSES, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shares /= shares.sum(2, keepdim=True)
    joined = shares.flatten(1)
    for row, mean, chosen in zip(shares.tolist(), averaged(joined, 4), majority(joined, 4), strict=True):
        means = [sum(part[k] for part in row) / 4 for k in range(CLASSES)]
        assert mean.tolist() == pytest.approx(means)
        votes = Counter(part.index(max(part)) for part in row)
        assert int(chosen) == max(range(CLASSES), key=lambda k: (votes[k], means[k]))


def test_volumes_are_cut_in_three_dimensions() -> None:
    cut = Decomposition((1, 4, 5, 6), (2, 1, 2), 1)
    assert cut.local_shapes == ((1, 3, 5, 4),) * 4
    inputs = torch.arange(2 * 120.0).view(2, 1, 4, 5, 6)
    assert torch.equal(cut.part(inputs, 1), inputs[:, :, :3, :, 2:])
    found = fit(tiny_cnn, cut, tiny_samples((1, 4, 5, 6), 12), Recipe(replace(SETTINGS, epochs=1)))
    assert found.net(inputs).shape == (2, CLASSES)
    assert found.probabilities.shape == (12, 4 * CLASSES)


def test_seconds_are_those_of_the_slowest_rank_and_of_the_stages_behind_it(fitted: Fitted) -> None:
    a, b, c, d = (each.seconds for each in fitted.local)
    last = fitted.gather_s + fitted.coarse.seconds
    assert fitted.seconds(1) == pytest.approx(a + b + c + d + last)
    assert fitted.seconds(2) == pytest.approx(max(a + c, b + d) + last)
    assert fitted.seconds(4) == pytest.approx(max(a, b, c, d) + last)


@pytest.mark.parametrize(
    ("factory", "samples", "said"),
    [
        (tiny_cnn, tiny_samples((1, 8, 9)), r"the samples have shape \(1, 8, 9\), but \(1, 8, 8\) is decomposed"),
        (tiny_cnn, Samples(tiny_samples().inputs, tiny_samples().labels[:5]), "33 samples with 5 labels"),
        (tiny_cnn, Samples(tiny_samples().inputs, tiny_samples().labels + 1), "labels are 1 to 3, but local network 0"),
        (lambda _: nn.Conv2d(1, 2, 3), tiny_samples(), r"scores of shape \(N, K\); for N = 2 it gave \(2, 2, 3, 3\)"),
        (lambda _: nn.Linear(7, 2), tiny_samples(), r"does not run on samples of shape \(1, 5, 5\): RuntimeError"),
        (lambda _: "net", tiny_samples(), "returned a str"),
        (lambda shape: shape[9], tiny_samples(), "part 0 of 2x2 parts, overlap 1: .* raised IndexError"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_the_first_epoch(
    factory: object, samples: Samples, said: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=said):
        fit(factory, CUT, samples, RECIPE, folder=tmp_path / "none")  # type: ignore[arg-type]  # that is the point
    assert not (tmp_path / "none").exists()


def test_settings_that_cannot_train_and_networks_that_do_not_fit_each_other_are_refused() -> None:
    for bad in ({"epochs": -1}, {"batch": 0}, {"learning_rate": 0.0}):
        with pytest.raises(UsageError, match="not possible"):
            Settings(**bad)
    nets = [nn.Sequential(nn.Flatten(), nn.Linear(25, k)) for k in (2, 2, 3, 2)]
    with pytest.raises(UsageError, match=r"different numbers of classes: \[2, 2, 3, 2\]"):
        assemble(CUT, nets)


def test_an_end_to_end_step_reaches_every_weight() -> None:
    net = decomposed(tiny_cnn, (1, 8, 8))
    found = train(lambda: net, tiny_samples(), replace(SETTINGS, epochs=1), "coherent")
    fresh = decomposed(tiny_cnn, (1, 8, 8)).state_dict()
    assert found.state.keys() == fresh.keys()
    gradients = {name: parameter.grad for name, parameter in net.named_parameters()}
    assert all(g is not None and bool(g.abs().sum() > 0) for n, g in gradients.items() if "0.bias" not in n)
