"""What every command line has in common: what it says of options that it does not know, and how it ends."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from difflib import get_close_matches
from typing import Any

from engines.errors import EngineError

MEMORY = "there is not enough memory: close other programs, use fewer lanes, or a smaller size"


class Parser(argparse.ArgumentParser):
    """A parser that names the option that was probably meant by an unknown one.

    `meant` may know other words for options than their spelling: it takes a flag and returns one, or None.
    """

    def __init__(self, *words: Any, meant: Callable[[str], str | None] = lambda flag: None, **more: Any) -> None:
        super().__init__(*words, **more)
        self._meant = meant

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """See argparse; exit code 2 with one line for what is not known."""
        found, rest = self.parse_known_args(args, namespace)
        unknown = [word.partition("=")[0] for word in rest if word.startswith("-")]
        if unknown:
            near = get_close_matches(unknown[0], list(_flags(self)), 1, cutoff=0.75)
            suggestion = self._meant(unknown[0]) or (near[0] if near else None)
            self.error(f"there is no option {unknown[0]}" + (f": did you mean {suggestion}?" if suggestion else ""))
        if rest:
            self.error(f"what is {rest[0]!r}? write a prompt of several words in quotes")
        return found


def _flags(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from _flags(below)


def exit_code(run: Callable[[], int | None], stopped: str = "stopped") -> int:
    """Runs a command: its own code or 0; 1 with one line for an error of the user, a file, a device or memory.

    130 with `stopped` after Ctrl-C. Other exceptions are our own mistakes and keep their traceback.
    """
    try:
        return run() or 0
    except MemoryError:
        message = MEMORY
    except ImportError as error:
        if "failed to map" not in str(error):  # what the system's loader says of a library that does not fit
            raise
        message = MEMORY
    except (EngineError, OSError) as error:
        message = str(error)
    except KeyboardInterrupt:
        sys.stderr.write(f"{stopped}\n")
        return 130
    sys.stderr.write(f"error: {message}\n")
    return 1
