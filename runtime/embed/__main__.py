"""`python -m runtime.embed`: what CMake is told to build `libdriffusion` with the packages of this environment."""

from __future__ import annotations

import sys

from engines.errors import BundleError
from runtime.embed.building import cmake_options


def main() -> int:
    """Prints the options, one a line; exit code 1 with one message where a package is missing."""
    try:
        print("\n".join(cmake_options()))
    except BundleError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
