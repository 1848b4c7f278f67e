"""Plays a sampler over compiled models: `Pipeline.load("shapes", devices="cpu*2").generate("a large red star")`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtime.pipeline import Pipeline, Result

__all__ = ["Pipeline", "Result"]


def __getattr__(name: str) -> Any:
    """The pipeline is imported when asked for: whoever wants the samplers alone needs no ONNX Runtime."""
    if name in __all__:
        from runtime import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module 'runtime' has no attribute {name!r}")
