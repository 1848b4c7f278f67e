"""What can go wrong that is not our own mistake: every message says what to do about it."""

from __future__ import annotations


class EngineError(Exception):
    """Root of every error that a user, a file or a device can cause."""


class ParameterError(EngineError):
    """An argument that cannot be used; `param` names it, as OpenAI's error shape does."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param


class DeviceError(EngineError):
    """A device that does not exist, is not supported, or stopped working."""


class DeviceMemoryError(DeviceError):
    """A device that works, and has too little memory left."""


class BundleError(EngineError):
    """An exported model or a plan that is missing, truncated, altered or made by something else."""


class ExportError(EngineError):
    """An export that cannot be made or is not equal to its source."""


class NonFiniteError(EngineError):
    """A model produced NaN or infinity: there is no image to return."""
