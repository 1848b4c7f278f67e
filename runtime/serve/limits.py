"""What a server allows; every number is an option of the command line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Limits:
    """Sizes, counts and times, whichever protocol a request comes by."""

    queue: int = 32  # requests that wait beside those that run
    connections: int = 512  # open at once
    seconds: float = 120.0  # of a request, waiting and running together
    drain: float = 60.0  # seconds to finish accepted requests before the process ends
    lane_seconds: float = 20.0  # of one round, after which a lane counts as hanging
    body: int = 1 << 20  # bytes of a request
    upload: int = 32 << 20  # bytes of a request with an image
    answer: int = 256 << 20  # bytes of an answer that is sent whole; 2048² pixels are 12 MiB
    prompt: int = 32_000  # characters
    side: int = 4096  # pixels of width and of height
    steps: int = 1000
    n: int = 10  # images of one request
    priorities: bool = False  # whether requests may name one

    def public(self) -> dict[str, Any]:
        """What clients are told."""
        return {
            "queue": self.queue, "connections": self.connections, "seconds": self.seconds, "body_bytes": self.body,
            "upload_bytes": self.upload, "answer_bytes": self.answer,
            "prompt_characters": self.prompt, "side_pixels": self.side, "num_inference_steps": self.steps, "n": self.n,
            "priorities": self.priorities,
        }  # fmt: skip
