"""From a PyTorch module to a layer graph: load, trace, lower."""
