"""What a server allows; every number is an option of the command line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Limits:
    """Of a server. `keys` are accepted as bearer tokens; none means that everyone may ask."""

    queue: int = 32  # requests that wait beside those that are being made
    connections: int = 512  # open at once
    seconds: float = 120.0  # in the queue and in the engine together
    drain: float = 60.0  # seconds to finish what was accepted before the process ends
    lane_seconds: float = 20.0  # in one round, after which a lane counts as hanging
    body: int = 1 << 20  # bytes of a request in JSON
    upload: int = 32 << 20  # bytes of a request with an image
    prompt: int = 32_000  # characters
    side: int = 4096  # pixels of width and of height
    steps: int = 1000
    n: int = 10  # images of one request
    keys: tuple[str, ...] = ()

    def public(self) -> dict[str, Any]:
        """What clients are told."""
        return {
            "queue": self.queue, "connections": self.connections, "seconds": self.seconds, "body_bytes": self.body,
            "upload_bytes": self.upload, "prompt_characters": self.prompt,
            "side_pixels": self.side, "num_inference_steps": self.steps, "n": self.n,
        }  # fmt: skip
