"""Finds the fastest way to train a CNN on given devices: traces, costs, searches, plans."""
