"""Plays a sampler over compiled models: `Pipeline.load("shapes", devices="cpu*2").generate("a large red star")`."""

from runtime.pipeline import Pipeline, Result

__all__ = ["Pipeline", "Result"]
