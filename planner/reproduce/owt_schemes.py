"""What one weird trick's three schemes send [OWT14, Section 4], counted pass by pass.

K workers run the convolutions on b images each and hold 1/K of every linear layer's outputs. The linear layers need
the last convolutional activations of all K b images, a bytes each, and make for every image a gradient that is a sum
over all workers. Who hands over how many of them in which pass is ``planner.ir.turns``; the runtime
(``runtime.variable_batch``) moves the same. The linear layers run on a pass while the next one is sent, and gradients
return to the owners of the images likewise. Links have no multicast: K - 1 receivers are K - 1 copies.
"""

from dataclasses import dataclass

from planner.ir.turns import Scheme, turns


@dataclass(frozen=True, slots=True)
class Volumes:
    """Bytes of one step of one worker, at K workers.

    Attributes:
        sent: activations and gradients of activations that a worker sends: 2 (K - 1) b a in every scheme, because
            every worker hands b images to K - 1 others, and returns an addend of the gradient of each of the
            (K - 1) b images of others. It receives as many.
        peak: activations that leave the busiest sender in one pass: (K - 1) b a; in (c) 1/K of that.
        in_turn: the same over all passes, one after the other: in (b) each pass waits for another sender, so
            that K (K - 1) b a go through single links in turn; in (a) and (c) all links are busy, (K - 1) b a.
        in_turn_once: ``in_turn`` where a broadcast counts once, as on a bus that all listen to: b a; in (b) K b a.
        hidden: share of the activations that can be sent while the linear layers compute: all passes but the
            first, (K - 1) / K; nothing in (a), which has one pass.
        weights: gradients and weights of the convolutions that a worker sends: 2 (K - 1) / K of their W bytes. Each
            worker gets its 1/K of the gradients from all others, and sends them 1/K of the weights.
    """

    sent: float
    peak: float
    in_turn: float
    in_turn_once: float
    hidden: float
    weights: float


def passes(scheme: Scheme, workers: int, images: int) -> tuple[tuple[int, ...], ...]:
    """Return for every pass how many of its images each worker hands to all others; K passes but in (a)."""
    handed = turns(scheme, (images,) * workers, 1 if scheme == "a" else workers)
    return tuple(tuple(b - a for a, b in turn) for turn in handed)


def volumes(scheme: Scheme, workers: int, *, images: int, activation_bytes: float, weight_bytes: float) -> Volumes:
    """Return what a worker sends in a step.

    Args:
        scheme: a, b or c.
        workers: K, at least 1.
        images: b, of each worker.
        activation_bytes: a, of the last convolutional activations of one image.
        weight_bytes: W, of all weights of the convolutions.

    Raises:
        ValueError: there is no worker.
    """
    if workers < 1:
        raise ValueError(f"{workers} workers: at least one is needed")
    handed = passes(scheme, workers, images)
    others = workers - 1
    own = sum(senders[0] for senders in handed)
    returned = sum(sum(senders[1:]) for senders in handed)
    busiest = [max(senders) for senders in handed]
    total = sum(map(sum, handed))
    return Volumes(
        sent=(others * own + returned) * activation_bytes,
        peak=others * max(busiest) * activation_bytes,
        in_turn=others * sum(busiest) * activation_bytes,
        in_turn_once=sum(busiest) * activation_bytes if others else 0.0,
        hidden=1 - sum(handed[0]) / total,
        weights=2 * others * (weight_bytes / workers),
    )
