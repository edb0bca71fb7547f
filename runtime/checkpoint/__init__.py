"""Checkpoints: saved under one plan and number of ranks, loaded under any other; see ``runtime.checkpoint.saving``."""

from runtime.checkpoint.newest import load_newest
from runtime.checkpoint.optimizers import full_optimizer_state_dict, load_full_optimizer
from runtime.checkpoint.saving import Resumed, Saving, exists, load, save, start_saving
from runtime.checkpoint.whole import export, full_state_dict, load_full

__all__ = [
    "Resumed", "Saving", "exists", "export", "full_optimizer_state_dict", "full_state_dict", "load", "load_full",
    "load_full_optimizer", "load_newest", "save", "start_saving",
]  # fmt: skip
