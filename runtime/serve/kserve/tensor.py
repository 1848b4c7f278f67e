"""Tensors of the Open Inference Protocol: their types, and their bytes both ways."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from engines.errors import ParameterError

TYPES = {
    "BOOL": np.dtype(np.bool_),
    **{f"UINT{bits}": np.dtype(f"<u{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"INT{bits}": np.dtype(f"<i{bits // 8}") for bits in (8, 16, 32, 64)},
    **{f"FP{bits}": np.dtype(f"<f{bits // 8}") for bits in (16, 32, 64)},
}
LENGTH = 4  # bytes before each element of a BYTES tensor, a little-endian number
MOST_DIMENSIONS = 8
MOST_TENSORS = 64  # of a request; also of its outputs, and of parameters
SHORT = 1 << 16  # bytes of a request that is parsed on the event loop; longer ones go to a thread
MOST_ELEMENTS = 1 << 16  # that are read one by one: of BYTES, and of lists


@dataclass(frozen=True, eq=False)
class Tensor:
    """A named array; elements of BYTES are `bytes` in an array of objects."""

    name: str
    datatype: str
    array: np.ndarray
    parameters: dict[str, Any] = field(default_factory=dict)

    @property
    def shape(self) -> list[int]:
        """As the protocol has it."""
        return list(self.array.shape)

    def raw(self) -> memoryview:
        """The bytes of the binary extension: row by row, little-endian."""
        if self.datatype == "BYTES":
            return memoryview(b"".join(len(one).to_bytes(LENGTH, "little") + one for one in self.array.ravel()))
        return np.ascontiguousarray(self.array, TYPES[self.datatype]).ravel().view(np.uint8).data

    def listed(self) -> list[Any]:
        """The elements for JSON; ParameterError for bytes that are no text."""
        if self.datatype != "BYTES":
            return list(self.array.ravel().tolist())
        try:
            return [one.decode() for one in self.array.ravel()]
        except UnicodeDecodeError:
            message = f"{self.name} holds bytes that JSON cannot: ask for it with binary_data true"
            raise ParameterError(self.name, message) from None


def checked_shape(name: str, shape: Any) -> tuple[int, ...]:
    """A shape whose dimensions are whole numbers from 0 on; ParameterError otherwise."""
    whole = isinstance(shape, Iterable) and not isinstance(shape, str | bytes | dict)
    listed = tuple(shape) if whole else None
    if listed is None or len(listed) > MOST_DIMENSIONS or any(
        isinstance(one, bool) or not isinstance(one, int) or one < 0 for one in listed
    ):  # fmt: skip
        raise ParameterError(name, f"the shape of {name} must be a list of up to {MOST_DIMENSIONS} whole numbers")
    return listed


def from_raw(name: str, datatype: str, shape: Any, data: bytes | memoryview) -> Tensor:
    """A tensor of its bytes; ParameterError where there are more or fewer than the shape needs."""
    known, view = checked_shape(name, shape), memoryview(data)
    count = math.prod(known)
    if datatype == "BYTES":
        elements = list(islice(_elements(name, view), _listed(name, count) + 1))
        if len(elements) != count:
            held = f"{len(elements)}" if len(elements) <= count else f"over {count}"
            raise ParameterError(name, f"{name} holds {held} elements, its shape {list(known)} needs {count}")
        return Tensor(name, datatype, _objects(elements, known))
    kind = _type(name, datatype)
    if view.nbytes != count * kind.itemsize:
        wanted = f"its shape {list(known)} of {datatype} needs {count * kind.itemsize}"
        raise ParameterError(name, f"{name} has {view.nbytes} bytes, {wanted}")
    # a copy: shared memory may change, or go away, while the engine reads
    return Tensor(name, datatype, np.frombuffer(view, kind).reshape(known).copy())


def from_values(name: str, datatype: str, shape: Any, values: Any) -> Tensor:
    """A tensor of the elements in JSON, nested or flat; ParameterError where they do not fit type and shape."""
    known = checked_shape(name, shape)
    count = math.prod(known)
    flat = list(islice(_flat(values), _listed(name, count) + 1))
    if len(flat) != count:
        held = f"{len(flat)}" if len(flat) <= count else f"over {count}"
        raise ParameterError(name, f"{name} holds {held} elements, its shape {list(known)} needs {count}")
    if datatype == "BYTES":
        if not all(isinstance(one, str | bytes) for one in flat):
            raise ParameterError(name, f"{name} is BYTES: its elements must be texts")
        try:
            return Tensor(name, datatype, _objects([o.encode() if isinstance(o, str) else o for o in flat], known))
        except UnicodeEncodeError:
            raise ParameterError(name, f"{name} is no valid Unicode: send UTF-8") from None
    kind = _type(name, datatype)
    fits: tuple[type, ...] = {"b": (bool,), "u": (int,), "i": (int,), "f": (int, float)}[kind.kind]
    if any(not isinstance(one, fits) or (isinstance(one, bool) and kind.kind != "b") for one in flat):
        raise ParameterError(name, f"{name} is {datatype}: it holds an element of another type")
    try:
        with np.errstate(over="ignore"):  # FP16: infinity, which is refused where it cannot be used
            return Tensor(name, datatype, np.array(flat, kind).reshape(known))
    except (OverflowError, ValueError) as error:
        raise ParameterError(name, f"{name} is {datatype}: {error}") from None


def _listed(name: str, count: int) -> int:
    """The number of elements; ParameterError for more than are read one by one."""
    if count > MOST_ELEMENTS:
        message = f"{name} has {count} elements: up to {MOST_ELEMENTS} may be BYTES or a list, send it as raw bytes"
        raise ParameterError(name, message)
    return count


def _type(name: str, datatype: str) -> np.dtype[Any]:
    if datatype not in TYPES:
        raise ParameterError(name, f"{name} has the unknown datatype {datatype!r}: use {', '.join(TYPES)} or BYTES")
    return TYPES[datatype]


def _elements(name: str, view: memoryview) -> Iterator[bytes]:
    place = 0
    while place < view.nbytes:
        start = place + LENGTH
        place = start + int.from_bytes(view[place:start], "little")
        if start > view.nbytes or place > view.nbytes:
            raise ParameterError(name, f"{name} ends within an element: BYTES are 4 bytes of length, then the element")
        yield bytes(view[start:place])


def _objects(elements: list[bytes], shape: tuple[int, ...]) -> np.ndarray:
    array = np.empty(len(elements), object)
    array[:] = elements
    return array.reshape(shape)


def _flat(values: Any) -> Iterator[Any]:
    """The elements of lists in lists, without recursion: their depth is the client's."""
    left = [iter(values)] if isinstance(values, list | tuple) else []
    while left:
        for one in left[-1]:
            if isinstance(one, list | tuple):
                left.append(iter(one))
                break
            yield one
        else:
            left.pop()
