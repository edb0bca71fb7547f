"""What is held against what: every way of training is a row of accuracy and seconds."""

from dataclasses import dataclass

from planner.frontend.decomposition import assemble, local_network
from runtime.decomposition import averaged, majority, outputs_of, train, transfer


@dataclass(frozen=True)
class Row:
    """A way of training a network.

    Attributes:
        data, grid, overlap, epochs, seed: of the case; no grid for the global CNN.
        way: which one.
        accuracy: share of the test samples that are classified rightly.
        seconds: of training with a rank for each part: the slowest local network, what is sent, the coarse network.
        alone_s: of training on one rank.
        parameters: of all networks together.
    """

    data: str
    grid: str
    overlap: int
    way: str
    epochs: int
    seed: int
    accuracy: float
    seconds: float
    alone_s: float
    parameters: int


def decomposed_rows(data, decomposition, fitted, settings):
    """Return the CNN-DNN and its baselines."""
    parts, labels = len(decomposition.regions), data.test.labels
    shares = outputs_of(fitted.net.probabilities, data.test.inputs)
    local = shares.unflatten(1, (parts, -1)).argmax(2)
    hits = (local == labels[:, None]).float().mean(0)
    slowest, everything = max(t.seconds for t in fitted.local), sum(t.seconds for t in fitted.local)
    nets = sum(p.numel() for p in fitted.net.nets.parameters())
    coarse = sum(p.numel() for p in fitted.net.coarse.parameters())
    scores = outputs_of(fitted.net.coarse, shares)
    behind = fitted.gather_s + fitted.coarse.seconds

    def row(way, accuracy, seconds=0.0, parameters=0):
        return Row(
            data.name, "x".join(map(str, decomposition.grid)), decomposition.overlap, way, settings.epochs,
            settings.seed, float(accuracy), slowest + seconds, everything + seconds, nets + parameters,
        )  # fmt: skip

    return [
        row("best local network", hits.max()),
        row("majority vote", share_right(majority(shares, parts), labels), fitted.gather_s),
        row("average probability", share_right(averaged(shares, parts).argmax(1), labels), fitted.gather_s),
        row("CNN-DNN", share_right(scores.argmax(1), labels), behind, coarse),
    ]


def end_to_end_rows(factory, data, decomposition, fitted, settings, folder=None):
    """Return the coherent network, from scratch and from the trained CNN-DNN; on this rank alone."""
    rows = []
    for way, file in (("coherent, from scratch", "coherent.pt"), ("coherent, weights transferred", "transferred.pt")):
        transferred = "transferred" in way

        def build(transferred=transferred):
            parts = range(len(decomposition.regions))
            net = assemble(decomposition, [local_network(factory, decomposition, i) for i in parts])
            if transferred:
                transfer(net, [each.state for each in fitted.local], fitted.coarse.state)
            return net

        found = train(build, data.train, settings, way, file=None if folder is None else folder / file)
        net = build()
        net.load_state_dict(found.state)
        before, alone = (fitted.seconds(len(fitted.local)), fitted.seconds(1)) if transferred else (0.0, 0.0)
        rows.append(_row(data, decomposition, settings, way, net, before + found.seconds, alone + found.seconds))
    return rows


def global_row(factory, data, settings, folder=None):
    """Return the CNN that sees the whole input."""
    file = None if folder is None else folder / "global.pt"
    found = train(lambda: factory(data.input_shape), data.train, settings, "global", file=file)
    net = factory(data.input_shape)
    net.load_state_dict(found.state)
    return _row(data, None, settings, "global CNN", net, found.seconds, found.seconds)


def share_right(classes, labels):
    return float((classes == labels).float().mean())


def _row(data, decomposition, settings, way, net, seconds, alone_s):
    grid = "" if decomposition is None else "x".join(map(str, decomposition.grid))
    overlap = 0 if decomposition is None else decomposition.overlap
    right = share_right(outputs_of(net.eval(), data.test.inputs).argmax(1), data.test.labels)
    parameters = sum(p.numel() for p in net.parameters())
    return Row(data.name, grid, overlap, way, settings.epochs, settings.seed, right, seconds, alone_s, parameters)
