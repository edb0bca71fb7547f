"""Trains CNN-DNNs by domain decomposition; ``planner.frontend.decomposition`` has the networks. Changes the model."""

from planner.frontend.decomposition import CnnDnn, Decomposition, averaged, decomposed, majority, transfer
from runtime.decomposition.fitting import Fitted, fit, train_local
from runtime.decomposition.training import Recipe, Samples, Settings, Trained, outputs_of, train

__all__ = [
    "CnnDnn", "Decomposition", "Fitted", "Recipe", "Samples", "Settings", "Trained", "averaged", "decomposed", "fit",
    "majority", "outputs_of", "train", "train_local", "transfer",
]  # fmt: skip
