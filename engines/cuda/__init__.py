"""Lanes on NVIDIA GPUs: streams, events, peer copies and graphs."""
