"""Predicted latency: costs of calls and links, the plans that are played with them, and how far they are off."""
