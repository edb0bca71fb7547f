"""Seconds and bytes of every choice, and the simulator of a whole step."""
