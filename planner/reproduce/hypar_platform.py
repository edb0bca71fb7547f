"""HyPar's machine as far as it is known: what a step takes in time and energy.

16 accelerators on Hybrid Memory Cubes [HyPar19, Sec. 6]: 84 GOPS each; an H-tree whose links carry 1600 Mbit/s at
the leaves, and twice as much with half as many of them on each level above; per 32-bit operation 0.9 pJ for an
addition, 3.7 for a multiplication, 640 for an access to DRAM. The paper's simulator is not public. Ours is the
plainest model that uses these constants: no overlap, full use of all units, and

    step_s   = 3 * 2 M / (16 * 84e9)  +  sum_h  (C_h / 2) / (2^(h-1) links * 2^(4-h) * 0.2e9 B/s)
    energy_j = 3 * M * (0.9 + 3.7) pJ  +  C / 4 * 2 * 640 pJ

for M multiply-adds forward (backward has twice as many; 2 operations each) and C_h bytes that all groups of level h
exchange in both directions, over links that are full duplex. Each exchanged word is read from one cube and written to
another. The denominator of C_h is the same on all levels, so both are of the form

    constant * (A * M + C)        with A in bytes per multiply-add,

and what one plan gains over another depends on A alone.

**Not known**: how busy the row-stationary units are, whether anything overlaps, what the 320 GB/s of a cube limit, and
how often its SRAM (5.0 pJ) and DRAM are read during compute; all of that is left out.
"""

from typing import Final

NUM_ACCELERATORS: Final = 16
OPERATIONS_PER_S: Final = 84e9
TREE_BYTES_PER_S: Final = NUM_ACCELERATORS * 0.2e9
"""8 / 2^(h-1) * 2^(h-1) links of 0.2 GB/s in both directions, on every level."""
MAC_J: Final = (0.9 + 3.7) * 1e-12
DRAM_J: Final = 640e-12
WORD_BYTES: Final = 4

TIME_BYTES_PER_MAC: Final = 3 * 2 / (NUM_ACCELERATORS * OPERATIONS_PER_S) * TREE_BYTES_PER_S
"""A of ``step_s``: 0.0143."""
ENERGY_BYTES_PER_MAC: Final = 3 * MAC_J / (2 * DRAM_J / WORD_BYTES)
"""A of ``energy_j``: 0.0431."""


def gain(macs: float, base_bytes: float, plan_bytes: float, bytes_per_mac: float) -> float:
    """Return how many times less a plan takes than another that exchanges ``base_bytes``."""
    return (bytes_per_mac * macs + base_bytes) / (bytes_per_mac * macs + plan_bytes)


def bytes_per_mac_of(gained: float, macs: float, base_bytes: float, plan_bytes: float) -> float:
    """Return the A at which a plan gains so much over another: the inverse of ``gain``."""
    return (base_bytes - gained * plan_bytes) / ((gained - 1) * macs)
