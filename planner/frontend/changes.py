"""Transforms that change a model, so that nobody takes their plans for an exact strategy of the original.

A strategy computes what one device would. A transform (domain decomposition, another pooling, another activation) gives
another network with other results. Its modules say so in an attribute ``changes_model``, one sentence; plans of a
model that has such a module carry the sentence, and every command that shows the plan prints it.
"""

from torch import nn

ATTRIBUTE = "changes_model"


def changes_of(module: nn.Module) -> tuple[str, ...]:
    """Return what the parts of a model say of how it differs from the one it was made of, each sentence once."""
    said = (getattr(part, ATTRIBUTE, None) for part in module.modules())
    return tuple(dict.fromkeys(sentence for sentence in said if isinstance(sentence, str) and sentence))
