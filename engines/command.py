"""What every command line has in common: how it ends."""

from __future__ import annotations

import sys
from collections.abc import Callable

from engines.errors import EngineError

MEMORY = "there is not enough memory: close other programs, use fewer lanes, or a smaller size"


def exit_code(run: Callable[[], int | None], stopped: str = "stopped") -> int:
    """Runs a command: its own code or 0; 1 with one line for an error of the user, a file, a device or memory.

    130 with `stopped` after Ctrl-C. Other exceptions are our own mistakes and keep their traceback.
    """
    try:
        return run() or 0
    except MemoryError:
        message = MEMORY
    except (EngineError, OSError) as error:
        message = str(error)
    except KeyboardInterrupt:
        sys.stderr.write(f"{stopped}\n")
        return 130
    sys.stderr.write(f"error: {message}\n")
    return 1
