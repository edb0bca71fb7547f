"""Published figures beside ours: one module for each paper, all with one function ``reproduce``."""
