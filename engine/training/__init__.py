"""Training of the baseline weights on procedural scenes."""
