"""Measures: speed against the floor, quality against an independent checker; results are files that anyone can redo."""
