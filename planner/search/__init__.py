"""Choosing: solvers see tables of numbers, not layers."""
