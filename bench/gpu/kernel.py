"""kernels/combine.cu on a GPU: its arithmetic against float64, and its bandwidth beside a copy's."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from bench.gpu.device import DeviceBench
from bench.gpu.parts import Row, Settings, open_driver
from engines.cuda.kernels import BYTES, DISTANCE_BLOCK, DISTANCE_GRID, PARTIALS
from engines.cuda.memory import narrow, widen

EPSILON = {"float16": 2**-11, "bfloat16": 2**-8, "float32": 2**-24}
# elements, inputs, outputs: sizes around the warp, the block and the widths of loads, and the largest combinations
ODD = (
    (1, 1, 1), (1, 2, 1), (31, 3, 4), (33, 5, 2), (127, 9, 8), (132, 256, 34), (257, 11, 5), (1023, 36, 17),
    (4096, 4, 3), (16384, 36, 17), (16387, 67, 33), (16388, 256, 34),
)  # fmt: skip
SIZES = (1 << 14, 1 << 17, 1 << 20, 1 << 23, 1 << 26)
SHAPES = ((1, 4), (5, 1), (11, 5))  # inputs, outputs: draft, refine, both with guidance; k = 4


def correct(settings: Settings) -> Iterator[Row]:
    """Every GPU and every type: errors over what rounding explains, with outputs misaligned and in place, too."""
    driver = open_driver()
    for ordinal in range(driver.count):
        for dtype in BYTES:
            bench = DeviceBench(driver, settings.cache, dtype, ordinal)
            rng, errors = np.random.default_rng(), []
            sizes = [size for size in ODD if size[0] < 1000 or not settings.rehearsal]
            for elements, inputs, outputs in sizes:
                for shift, in_place in ((0, False), (BYTES[dtype], False), (0, True)):
                    errors.append(_error_over_bound(bench, rng, elements, inputs, outputs, shift, in_place))
            worst = float(np.max(errors))  # unlike max(), it keeps a NaN
            flag = _flag(bench)
            bench.to_device(bench.table, np.array([1, np.inf], np.float32))
            value = bench.allocate(256)
            bench.to_device(value, narrow(np.ones(8, np.float32), dtype))
            bench.launch(*bench.prepared([value], [value + 64, value + 128], 8))
            noticed, advanced = _flag(bench), _advanced(bench)
            distance = _distance_error(bench, rng)
            yield {
                "gpu": ordinal, "dtype": dtype, "combinations": 3 * len(sizes), "error_over_bound": worst, "flag": flag,
                "infinity_noticed": noticed, "round_advanced": advanced, "distance_error": distance,
            }  # fmt: skip
            assert worst <= 1, f"{dtype}: the kernel is wrong by {worst:.3g} times what rounding explains"
            assert not flag, f"{dtype}: finite outputs were called not finite"
            assert noticed, f"{dtype}: an infinite output was not noticed"
            assert advanced, f"{dtype}: the number of the round was not counted up"
            assert distance < 1e-5, f"{dtype}: distances are wrong by {distance:.3g}"
            bench.close()


def _error_over_bound(
    bench: DeviceBench, rng: np.random.Generator, elements: int, inputs: int, outputs: int, shift: int, in_place: bool
) -> float:  # fmt: skip
    """The largest error of one combination over the bound that rounding gives; outputs begin `shift` bytes late."""
    dtype, size = bench.dtype, elements * BYTES[bench.dtype]
    values = rng.standard_normal((inputs, elements), np.float32)
    sources = [bench.allocate(size) for _ in range(inputs)]
    spare = outputs - inputs if in_place else outputs
    blocks = [bench.allocate(size + shift) for _ in range(max(spare, 0))]
    targets = ([*sources[:outputs]] if in_place else []) + [block + shift for block in blocks]
    raw = [narrow(value, dtype) for value in values]
    for pointer, value in zip(sources, raw, strict=True):
        bench.to_device(pointer, value)
    rows = rng.standard_normal((outputs, inputs)).astype(np.float32)
    bench.to_device(bench.table, np.ascontiguousarray(rows.T))
    bench.launch(*bench.prepared(sources, targets, elements))
    bench.settle()
    stored = np.stack([widen(one.view(np.uint8), dtype) for one in raw]).astype(np.float64)
    wanted = rows.astype(np.float64) @ stored
    got = np.stack([widen(bench.to_host(pointer, size), dtype) for pointer in targets])
    bench.free([*sources, *blocks])
    bound = 1.01 * EPSILON[dtype] * np.abs(wanted) + inputs * 2**-23 * (np.abs(rows) @ np.abs(stored)) + 1e-7
    return float((np.abs(got - wanted) / bound).max())


def _flag(bench: DeviceBench) -> bool:
    return bool(bench.to_host(bench.small + 4, 4).view(np.uint32)[0])


def _advanced(bench: DeviceBench) -> bool:
    """Whether the number of the block goes round, and the host sees how often."""
    found, before = [], int(bench.seen[0])
    for _ in range(3):
        bench.advance(3)
        block = int(bench.to_host(bench.small + 8, 4).view(np.uint32)[0])
        found.append((block, int(bench.seen[0]) - before))
    return found == [(1, 1), (2, 2), (0, 3)]


def _distance_error(bench: DeviceBench, rng: np.random.Generator) -> float:
    """The largest relative error of ‖a − b‖/‖b‖ over odd sizes."""
    errors, function = [], bench.kernels.function("distance")
    for elements in (1, 31, 4099):
        size = elements * BYTES[bench.dtype]
        pair = [narrow(rng.standard_normal(elements, np.float32), bench.dtype) for _ in range(2)]
        pointers, partials = [bench.allocate(size) for _ in range(2)], bench.allocate(4 * PARTIALS)
        for pointer, value in zip(pointers, pair, strict=True):
            bench.to_device(pointer, value)
        parameters = [*map(ctypes.c_void_p, pointers), ctypes.c_ulonglong(elements), ctypes.c_void_p(partials)]
        bench.driver.launch(function, DISTANCE_GRID, DISTANCE_BLOCK, bench.stream, parameters)
        sums = bench.to_host(partials, 4 * PARTIALS).view(np.float32).reshape(2, -1).sum(1, dtype=np.float64)
        a, b = (widen(one.view(np.uint8), bench.dtype).astype(np.float64) for one in pair)
        wanted = float(np.linalg.norm(a - b) / np.linalg.norm(b))
        errors.append(abs(np.sqrt(sums[0] / sums[1]) / wanted - 1))
        bench.free([*pointers, partials])
    return float(np.max(errors))


def bandwidth(settings: Settings) -> Iterator[Row]:
    """Bytes per second on the first GPU, beside a copy of as many elements and the smallest launch."""
    driver = open_driver()
    sizes = SIZES[:1] if settings.rehearsal else SIZES
    for dtype in ("float16", "float32"):
        bench, size = DeviceBench(driver, settings.cache, dtype), BYTES[dtype]
        for elements in sizes:
            yield from _rates(bench, elements, size, 1 if settings.rehearsal else 20)
        bench.close()


def _rates(bench: DeviceBench, elements: int, size: int, repeats: int) -> Iterator[Row]:
    pointers: Sequence[int] = [bench.allocate(elements * size) for _ in range(16)]
    for number, pointer in enumerate(pointers):
        bench.driver("cuMemsetD8Async", pointer, 0x31 + number, elements * size, bench.stream)
    copy: Any = bench.copy
    copied = bench.seconds(copy, pointers[0], pointers[1], elements * size, repeats=repeats)
    empty = bench.seconds(bench.empty, repeats=repeats)
    for inputs, outputs in SHAPES:
        prepared = bench.prepared(pointers[:inputs], pointers[inputs : inputs + outputs], elements)
        seconds = bench.seconds(bench.launch, *prepared, repeats=repeats)
        moved = (inputs + outputs) * elements * size
        yield {
            "dtype": bench.dtype, "elements": elements, "shape": f"{inputs}→{outputs}", "us": seconds * 1e6,
            "gb_per_s": moved / seconds / 1e9, "of_copy": moved / seconds / (2 * elements * size / copied),
            "us_empty_launch": empty * 1e6, "of_empty_launch": seconds / empty,
        }  # fmt: skip
    bench.free(pointers)
