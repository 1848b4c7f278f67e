"""kernels/combine.cu: its arithmetic against float64 on this processor, its machine code for every architecture."""

from __future__ import annotations

import ctypes
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.cuda.kernels import (
    ARCHITECTURES,
    BLOCK,
    BYTES,
    MAX_GRID,
    MAX_INPUTS,
    MAX_LANES,
    MAX_OUTPUTS,
    MAX_PRODUCT_INPUTS,
    MAX_TARGETS,
    SOURCE,
    STORAGE,
    Combination,
    Variant,
    combination,
    compile_variant,
    machine_code,
    product,
    width,
)
from engines.cuda.memory import narrow, widen
from engines.errors import DeviceError
from tests.host_kernel import HostKernel

DTYPES = tuple(STORAGE)
EPSILON = {"float16": 2**-11, "bfloat16": 2**-8, "float32": 2**-24}


def aligned(count: int, dtype: str, *, misaligned: bool = False) -> Any:
    """Raw memory for `count` values, on 16 bytes or one value beside it; poisoned."""
    size = BYTES[dtype]
    raw = np.full(count * size + 64, 0xFF, np.uint8)
    start = -raw.ctypes.data % 16 + (size if misaligned else 0)
    return raw[start : start + count * size]


def launch(
    inputs: list[Any], targets: list[list[Any]], rows: Any, dtype: str, count: int, **more: Any
) -> tuple[int, list[int]]:
    """One launch on the host as the backend would launch it; the flag, and what it was told to be wide."""
    parameters = combination(
        [one.ctypes.data for one in inputs], [[one.ctypes.data for one in goals] for goals in targets], count
    )
    table = np.concatenate([np.full(7, np.nan, np.float32), rows.T.ravel().astype(np.float32)])
    number, flag = np.zeros(1, np.uint32), np.zeros(1, np.uint32)
    parameters.data, parameters.round, parameters.not_finite = (a.ctypes.data for a in (table, number, flag))
    parameters.rows = 7
    pointers = [one.ctypes.data for one in (*inputs, *(goal for goals in targets for goal in goals))]
    at_once = width(dtype, len(targets), count, pointers)
    grid = more.get("grid") or min(-(-count // (at_once * BLOCK)), MAX_GRID)
    HostKernel(dtype).combine(parameters, len(targets), at_once, grid, BLOCK)
    return int(flag[0]), [at_once]


def check(values: Any, rows: Any, dtype: str, got: Any) -> None:
    """Within twice the error of doing it plainly in the storage type, which rounds once per output and input."""
    wanted = rows.astype(np.float64) @ values.astype(np.float64)
    magnitude = np.abs(rows).astype(np.float64) @ np.abs(values).astype(np.float64)
    bound = EPSILON[dtype] * np.abs(wanted) * 1.01 + len(values) * 2**-23 * magnitude + 1e-7
    assert (np.abs(got - wanted) <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [1, 31, 257, 16384, 16387])
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (2, 4), (1, 5), (5, 1), (11, 5), (19, 8), (36, 17), (67, 33)])
@pytest.mark.parametrize("misaligned", [False, True], ids=["aligned", "misaligned"])
def test_equal_to_float64(
    dtype: str, count: int, inputs: int, outputs: int, misaligned: bool, rng: np.random.Generator
) -> None:
    memory = [aligned(count, dtype, misaligned=misaligned) for _ in range(inputs)]
    values = rng.standard_normal((inputs, count), np.float32)
    for raw, value in zip(memory, values, strict=True):
        raw[:] = narrow(value, dtype).view(np.uint8)
    stored = np.stack([widen(raw, dtype) for raw in memory])
    rows = rng.standard_normal((outputs, inputs)).astype(np.float32)
    goals = [[aligned(count, dtype) for _ in range(1 + m % 2)] for m in range(outputs)]
    flag, _ = launch(memory, goals, rows, dtype, count)
    got = np.stack([widen(copies[0], dtype) for copies in goals])
    check(stored, rows, dtype, got)
    assert flag == 0
    for copies in goals:
        assert all(np.array_equal(copies[0], other) for other in copies)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inputs", [1, 3, 8, 33, 67])
def test_in_place(dtype: str, inputs: int, rng: np.random.Generator) -> None:
    """Every output replaces an input, in another order; rounded once, so twice the storage's error is never needed."""
    count, outputs = int(rng.integers(1, 700)), min(inputs, 33)
    memory = [aligned(count, dtype) for _ in range(inputs)]
    for raw in memory:
        raw[:] = narrow(rng.standard_normal(count, np.float32), dtype).view(np.uint8)
    stored = np.stack([widen(raw.copy(), dtype) for raw in memory])
    rows = rng.standard_normal((outputs, inputs)).astype(np.float32)
    order = rng.permutation(inputs)[:outputs]
    launch(memory, [[memory[n]] for n in order], rows, dtype, count)
    check(stored, rows, dtype, np.stack([widen(memory[n], dtype) for n in order]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_number_of_inputs_and_outputs(dtype: str, rng: np.random.Generator) -> None:
    for outputs in range(1, MAX_OUTPUTS + 1):
        inputs, count = int(rng.integers(1, 68)), int(rng.integers(1, 300))
        memory = [aligned(count, dtype) for _ in range(inputs)]
        for raw in memory:
            raw[:] = narrow(rng.standard_normal(count, np.float32), dtype).view(np.uint8)
        rows = rng.standard_normal((outputs, inputs)).astype(np.float32)
        goals = [[aligned(count, dtype)] for _ in range(outputs)]
        launch(memory, goals, rows, dtype, count, grid=int(rng.integers(1, 5)))
        stored = np.stack([widen(raw, dtype) for raw in memory])
        check(stored, rows, dtype, np.stack([widen(one[0], dtype) for one in goals]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, "overflow"])
def test_what_is_not_finite_raises_the_flag(dtype: str, bad: float | str) -> None:
    """Also when only the storage type overflows, and only in the last element."""
    largest = {"float16": 6e4, "bfloat16": 3e38, "float32": 3e38}[dtype]
    memory = [aligned(1000, dtype) for _ in range(2)]
    for raw in memory:
        raw[:] = narrow(np.ones(1000, np.float32), dtype).view(np.uint8)
    goal = [[aligned(1000, dtype)]]
    rows = np.ones((1, 2))
    assert launch(memory, goal, rows, dtype, 1000)[0] == 0
    value = np.ones(1000, np.float32)
    value[-1] = largest if bad == "overflow" else float(bad)
    memory[1][:] = narrow(value, dtype).view(np.uint8)
    assert launch(memory, goal, rows * (4 if bad == "overflow" else 1), dtype, 1000)[0] == 1


def test_timesteps_and_rounds() -> None:
    """A launch reads the block of its round; `advance` goes on to the next one and round again."""
    kernel, stride, rounds = HostKernel("float32"), 16, 3
    table = np.arange(stride * rounds, dtype=np.float32).reshape(rounds, stride)
    latent, out = np.ones(5, np.float32), np.zeros(5, np.float32)
    first, second, number, flag = (
        np.full(4, -1, np.float32), np.full(4, -1, np.float32), np.zeros(2, np.uint32), np.zeros(1, np.uint32),
    )  # fmt: skip
    parameters = combination(
        [latent.ctypes.data], [[out.ctypes.data]], 5, [(first.ctypes.data, 3), (second.ctypes.data, 2)]
    )
    parameters.data, parameters.round, parameters.not_finite = (a.ctypes.data for a in (table, number, flag))
    parameters.stride, parameters.rows, parameters.timesteps = stride, 2, 8
    seen = np.zeros(1, np.uint32)
    for count, n in enumerate((0, 1, 2, 0), 1):
        kernel.combine(parameters, 1, 1, 2, BLOCK)
        assert (out == table[n, 2]).all()
        assert first.tolist() == [*table[n, 8:11].tolist(), -1]
        assert second.tolist() == [*table[n, 11:13].tolist(), -1, -1]
        kernel.advance(number.ctypes.data, rounds, seen.ctypes.data)
        assert number[1] == seen[0] == count


@pytest.mark.parametrize("dtype", DTYPES)
def test_distance(dtype: str, rng: np.random.Generator) -> None:
    for count in (1, 31, 16387):
        memory = [aligned(count, dtype) for _ in range(2)]
        for raw in memory:
            raw[:] = narrow(rng.standard_normal(count, np.float32), dtype).view(np.uint8)
        a, b = (widen(raw, dtype).astype(np.float64) for raw in memory)
        partial = np.full(2 * 4 * 64, np.nan, np.float32)
        HostKernel(dtype).distance(memory[0].ctypes.data, memory[1].ctypes.data, count, partial.ctypes.data, 4, 64)
        difference, norm = partial.reshape(2, -1).sum(1, dtype=np.float64)
        assert np.allclose([difference, norm], [((a - b) ** 2).sum(), (b**2).sum()], rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_inner_product(dtype: str, rng: np.random.Generator) -> None:
    for count, inputs in ((1, 1), (31, MAX_PRODUCT_INPUTS), (16387, 5)):
        memory = [aligned(count, dtype) for _ in range(inputs)]
        for raw in memory:
            raw[:] = narrow(rng.standard_normal(count, np.float32), dtype).view(np.uint8)
        rows = rng.standard_normal((2, inputs)).astype(np.float32)
        a, b = rows.astype(np.float64) @ np.stack([widen(raw, dtype).astype(np.float64) for raw in memory])
        partial = np.full(3 * 4 * 64, np.nan, np.float32)
        given = product([raw.ctypes.data for raw in memory], rows, count, partial.ctypes.data)
        HostKernel(dtype).inner_product(given, 4, 64)
        found, scale = partial.reshape(3, -1).sum(1, dtype=np.float64), (a @ a) * (b @ b)
        assert np.allclose(found, [a @ b, a @ a, b @ b], rtol=1e-5, atol=1e-6 * scale**0.5)
    with pytest.raises(DeviceError, match="an inner product over 33 latents"):
        product(range(MAX_PRODUCT_INPUTS + 1), [(), ()], 1, 0)


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, 65504.0, 65520.0, 1e-8, 6e-8, np.pi, np.inf, -np.inf, np.nan])
def test_conversion_rounds_to_nearest(value: float) -> None:
    """bfloat16 in the kernel and on the host agree bit for bit."""
    for dtype in ("float16", "bfloat16"):
        one, goal = np.array([value], np.float32), aligned(1, dtype)
        source = aligned(1, dtype)
        source[:] = narrow(np.ones(1, np.float32), dtype).view(np.uint8)
        launch([source], [[goal]], np.array([[value]]), dtype, 1)
        with np.errstate(over="ignore"):
            assert np.array_equal(widen(goal, dtype), widen(narrow(one, dtype).view(np.uint8), dtype), equal_nan=True)


def test_width_is_16_bytes_where_it_can_be() -> None:
    assert width("float16", 5, 16384, [0, 16]) == 8
    assert width("float32", 5, 16384, [0, 16]) == 4
    assert width("float16", 5, 16384, [0, 8]) == 4
    assert width("float16", 5, 16387, [0, 16]) == 1
    assert width("float16", 34, 16384, [0, 16]) == 2


def test_too_many_latents_for_a_launch_is_one_message() -> None:
    with pytest.raises(DeviceError, match="use a smaller k"):
        combination([0] * (MAX_INPUTS + 1), [[0]], 1)


def test_the_structs_agree() -> None:
    """Sizes as the compiler of the kernel sees them; under 4096 bytes, which every driver takes as parameters."""
    text = SOURCE.read_text()
    for name, value in (
        ("INPUTS", MAX_INPUTS), ("TARGETS", MAX_TARGETS), ("OUTPUTS", MAX_OUTPUTS), ("LANES", MAX_LANES),
    ):  # fmt: skip
        assert f"#define MAX_{name} {value}\n" in text
    fields = re.findall(
        r"^    [\w ]+[ *](\w+)(?:\[.*\])?;",
        text[text.index("struct Combination") : text.index("};", text.index("struct Combination"))],
        re.M,
    )
    assert fields == [name for name, *_ in Combination._fields_]
    assert ctypes.sizeof(Combination) <= 4096


def report(log: str) -> dict[str, int]:
    """Registers and spilled bytes from the compiler's resource report."""
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill", log)]
    stack = [int(n) for n in re.findall(r"(\d+) bytes stack frame", log)]
    assert spills and stack, f"no resource report: {log}"
    return {"spilled": sum(spills), "stack": sum(stack), "registers": max(map(int, re.findall(r"Used (\d+)", log)))}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_compiles_for_every_architecture_without_spilling(arch: str) -> None:
    variants = [Variant(dtype) for dtype in DTYPES]
    variants += [Variant(dtype, m, width(dtype, m, 16384, [0])) for dtype in DTYPES for m in (1, 5)]
    variants += [
        Variant("float16", 8, 8),
        Variant("bfloat16", 17, 4),
        Variant("float32", 17, 4),
        Variant("float16", 34, 2),
    ]
    for variant in variants:
        code, log = compile_variant(variant, arch)
        assert code.startswith(b"\x7fELF")
        found = report(log)
        assert found["spilled"] == found["stack"] == 0, (variant, found)
        assert found["registers"] <= 255


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_variant_spills(arch: str, dtype: str) -> None:
    """As wide as each number of outputs allows, and the largest ones element by element."""
    variants = [Variant(dtype, m, width(dtype, m, 16384, [0])) for m in range(1, MAX_OUTPUTS + 1)]
    variants += [Variant(dtype, m, 1) for m in (17, MAX_OUTPUTS)]
    with ThreadPoolExecutor(2) as pool:
        logs = list(pool.map(lambda variant: compile_variant(variant, arch)[1], variants))
    for variant, log in zip(variants, logs, strict=True):
        assert report(log)["spilled"] == 0, variant


def test_machine_code_is_cached_by_source_and_architecture(tmp_path: Path) -> None:
    variant = Variant("float16", 2, 8)
    code = machine_code(variant, "90", tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    kept = next(tmp_path.iterdir())
    kept.write_bytes(b"as it was")
    assert machine_code(variant, "90", tmp_path) == b"as it was"
    assert machine_code(variant, "80", tmp_path).startswith(b"\x7fELF")
    assert machine_code(Variant("float16", 3, 8), "90", tmp_path) != code
    assert len(list(tmp_path.iterdir())) == 3


def test_an_unknown_architecture_is_one_message() -> None:
    with pytest.raises(DeviceError, match="cannot be compiled for sm_12345"):
        compile_variant(Variant("float32"), "12345")
