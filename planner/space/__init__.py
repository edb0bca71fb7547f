"""Which splits are legal."""
