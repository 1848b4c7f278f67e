"""`eval "$(python -m tests.libcuda)"` gives a shell the imaginary driver."""

import os

from tests.libcuda.plugin import environment

for name, value in environment().items():
    if os.environ.get(name) != value:
        print(f"export {name}='{value}'")
