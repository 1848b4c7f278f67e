"""`Option`: what one argument of `Pipeline.generate` may be, and how the ways to give it name it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from engines.errors import DeviceError, ParameterError

Range = tuple[float | None, float | None]


@dataclass(frozen=True)
class Option:
    """One argument of `Pipeline.generate`.

    kind: the type of one value: str, int, float, bool, `numpy.ndarray` or `PIL.Image.Image`; `several` if a sequence
    of them is also taken.
    default: None means `absent`, which says in words what is used then.
    low, high: the range of numbers, both included; None where it is open.
    flag: the command line's name, without dashes for a positional argument; None where the command line has none.
    http: the HTTP API's field; None where it has none. http_range: its range, narrower than low and high for some.
    choices: the names to choose from. Those of `scheduler` are checked where the model's own scheduler is known.
    of_model: the model or the lanes narrow the range, so that `Call.checked` checks it and says the narrower one.
    """

    name: str
    kind: type
    several: bool
    default: Any
    help: str
    absent: str | None = None
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    flag: str | None = None
    http: str | None = None
    http_range: Range = (None, None)
    of_model: bool = False

    def check(self, value: Any, *, high: float | None = None) -> Any:
        """The value in its plain type; ParameterError where it is of another type or out of range.

        `high` replaces the option's own. Texts, arrays and images are checked where they are used.
        """
        if value is None and self.default is None:
            return None
        if self.several and self.kind is int:
            if not isinstance(value, list | tuple):
                raise ParameterError(self.name, f"{self.name} must be a list of whole numbers, not {value!r}")
            return tuple(self._number(one, high or self.high) for one in value)
        if self.choices and value not in self.choices:
            raise ParameterError(self.name, f"unknown {self.name} {value!r}: use one of {', '.join(self.choices)}")
        if self.kind is bool and not isinstance(value, bool):
            raise ParameterError(self.name, f"{self.name} must be True or False, not {value!r}")
        if self.kind is str:
            for text in value if self.several and isinstance(value, list | tuple) else (value,):
                self._text(text)
        if self.kind is np.ndarray:
            return self._array(value)
        return self._number(value, high or self.high) if self.kind in (int, float) else value

    def _array(self, value: Any) -> np.ndarray:
        """An array of another library through DLPack, without a copy where it lies in this computer's memory.

        One on a GPU is copied, after what its library has under way there.
        """
        from engines.cuda.arrays import on_gpu, to_host  # late: few calls bring an array

        if hasattr(value, "detach"):  # PyTorch's, which does not export what needs a gradient
            value = value.detach()
        try:
            if on_gpu(value):
                found = to_host(value)
            else:
                found = np.from_dlpack(value) if hasattr(value, "__dlpack__") else np.asarray(value)
        except (BufferError, DeviceError, RuntimeError, TypeError, ValueError) as error:
            message = f"{self.name} cannot be read as an array ({error}): give contiguous float32"
            raise ParameterError(self.name, message) from error
        if found.dtype.kind not in "fiu":
            raise ParameterError(self.name, f"{self.name} must be an array of numbers, not of {found.dtype}")
        return found

    def _text(self, value: Any) -> None:
        try:
            if isinstance(value, str):
                value.encode()
        except UnicodeEncodeError as error:
            wrong = ascii(value[error.start : error.end])
            message = f"{self.name} is no valid Unicode: it holds {wrong} at character {error.start}: send UTF-8"
            raise ParameterError(self.name, message) from None

    def _number(self, value: Any, high: float | None) -> float:
        whole, low = self.kind is int, self.low
        types = int | np.integer if whole else int | float
        if (
            isinstance(value, bool)
            or not isinstance(value, types)
            or not math.isfinite(value)
            or value < (-math.inf if low is None else low)
            or value > (math.inf if high is None else high)
        ):
            kind = "whole number" if whole else "number"
            if low is not None and high is not None:
                wanted = f"a {kind} from {low} to {high}"
            else:
                wanted = f"a finite {kind}" + (f" of at least {low}" if low is not None else "")
            raise ParameterError(self.name, f"{self.name} must be {wanted}, not {value!r}")
        return int(value) if whole else float(value)

    @property
    def default_text(self) -> str:
        """The default as documentation and `--help` show it."""
        if self.absent is not None:
            return self.absent
        return "none" if self.default is None or self.default == () else str(self.default)
