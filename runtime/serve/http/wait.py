"""Waits for a request of the engine while its HTTP client may disconnect."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import Request as HttpRequest

from runtime.serve.request import CancelledError, Request


async def wait_or_cancel(wanted: asyncio.Future[Any], request: Request, http: HttpRequest) -> Any:
    """The result of `wanted`. The request is cancelled when the client disconnects or the deadline passes before.

    Nobody waits for the round that it may be in then.
    """
    wanted.add_done_callback(lambda one: one.cancelled() or one.exception())  # retrieved, also when nobody waits
    gone = asyncio.ensure_future(http.receive())  # the body has been read: the next message is the disconnection
    try:
        await asyncio.wait(
            {wanted, gone}, timeout=max(request.seconds_left, 0), return_when=asyncio.FIRST_COMPLETED
        )  # fmt: skip
        if not wanted.done():
            reason = CancelledError("the client went away") if gone.done() else request.deadline_error()
            request.cancel(reason)
            raise reason
        return await wanted
    except asyncio.CancelledError:  # the server is going down
        request.cancel()
        raise
    finally:
        gone.cancel()
