"""Which process a loaded model belongs to: threads and devices do not survive a fork."""

from __future__ import annotations

import os

from engines.errors import DeviceError


class Owner:
    """The process in which something was made."""

    def __init__(self) -> None:
        self._process = os.getpid()

    def check(self) -> None:
        """DeviceError in a process that was forked later, where waiting for a lane would never end."""
        if os.getpid() != self._process:
            raise DeviceError("the model was loaded before this process was forked: load it after the fork")
