"""What joins a stage of a pipeline in cycles to its neighbours, and the same between stages of one process."""

from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol

import torch

Message = Sequence[torch.Tensor | None]


class Link(Protocol):
    """Messages between a stage and one neighbour, in both directions; each direction keeps its order.

    A message is the tensors of one batch: activations, or their gradients with None for those that have none.
    """

    def send(self, tensors: Message) -> None:
        """Start sending a message; nobody may write into the tensors afterwards."""
        ...

    def expect(self) -> None:
        """Start receiving the next message, which will come without further calls of this rank."""
        ...

    def receive(self) -> Any:
        """Wait for the oldest expected message: a tuple of tensors.

        Returns:
            Activations that have a gradient require one.

        Raises:
            RunError: The neighbour died or hangs.
        """
        ...

    def flush(self) -> None:
        """Wait until all that was sent has gone.

        Raises:
            RunError: The neighbour died or hangs.
        """
        ...


class MemoryLink:
    """One end of a link between two stages of one process."""

    def __init__(self, incoming: deque[Message], outgoing: deque[Message]) -> None:
        self._incoming, self._outgoing = incoming, outgoing

    @classmethod
    def pair(cls) -> tuple["MemoryLink", "MemoryLink"]:
        """Return both ends of a new link."""
        one, other = deque[Message](), deque[Message]()
        return cls(one, other), cls(other, one)

    def send(self, tensors: Message) -> None:
        """Put a message in the queue."""
        self._outgoing.append(tuple(tensors))

    def expect(self) -> None:
        """Nothing is under way in one process."""

    def receive(self) -> Any:
        """Take a message from the queue."""
        return self._incoming.popleft()

    def flush(self) -> None:
        """Nothing is under way in one process."""
