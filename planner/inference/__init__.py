"""Inference on constrained devices: groups of neurons placed for rate or communication within memory [Oliveira19]."""
