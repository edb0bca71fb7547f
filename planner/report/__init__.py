"""What people read: the tables and sentences of plans and comparisons."""
