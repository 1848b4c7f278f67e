"""Measurements: speed against a floor, quality against an independent checker; results are reproducible files."""
