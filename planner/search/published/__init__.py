"""Solvers as published, each a special case of ours: its space, its cost, its order of decisions."""
