"""Torch's random generators of every rank, kept across runs."""

from typing import Any, Final

import torch

_SEEDS: Final = 2**62
_APART: Final = 1_000_003


def generators(device: torch.device) -> dict[str, torch.Tensor | None]:
    """Return the state of torch's generators on the CPU and on a rank's device."""
    on_gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return {"cpu": torch.get_rng_state(), "cuda": on_gpu}


def restore_generators(saved: dict[str, Any], device: torch.device, apart: int) -> None:
    """Set torch's generators.

    Args:
        saved: as of ``generators``.
        device: of this rank.
        apart: zero for the rank whose state it was; others get numbers of their own, drawn from it.
    """
    source = torch.Generator()
    source.set_state(saved["cpu"])
    drawn = int(torch.randint(_SEEDS, (), generator=source))
    if apart:
        torch.manual_seed((drawn + _APART * apart) % _SEEDS)
        return
    torch.set_rng_state(saved["cpu"])
    if device.type == "cuda":
        if saved["cuda"] is None:
            torch.cuda.manual_seed(drawn)
        else:
            torch.cuda.set_rng_state(saved["cuda"], device)
