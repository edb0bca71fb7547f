"""Times of single layers: measured tables, and a roofline where nothing was measured."""
