"""What the ingress and the replicas send each other: one HTTP request, and its answer in parts."""

from __future__ import annotations

from typing import NamedTuple

Headers = tuple[tuple[bytes, bytes], ...]


class Asked(NamedTuple):
    """An HTTP request for a replica.

    id: of the request within the cluster, the same when it is asked again. seconds: that are left of its time.
    seed: what seed -1 means, so that the same image is made when it is asked again.
    """

    id: str
    seconds: float
    seed: int
    method: str
    path: str
    query: bytes
    headers: Headers
    body: bytes


class Part(NamedTuple):
    """A part of an answer as ASGI has it; the first one has the status and the headers. An event is one part."""

    body: bytes
    more: bool
    status: int = 0
    headers: Headers = ()
