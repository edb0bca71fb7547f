"""Timing layers, memory and links of this machine."""
