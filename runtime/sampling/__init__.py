"""Samplers, schedulers and their execution on any backend; imports nothing from the rest of `runtime`."""
