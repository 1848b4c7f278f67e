"""What a host may do wrong: every wrong argument, version, handle and buffer is answered, and nothing else happens."""
# covers: runtime/embed/src/api.cc, runtime/embed/src/settings.cc, runtime/embed/src/lanes.cc

from __future__ import annotations

import ctypes
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from ctypes import byref, c_size_t, c_uint32, c_uint64
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.cuda.driver import available
from engines.devices import cores
from engines.store import Bundle
from runtime.embed.building import SOURCE
from runtime.lane_policy import at_once, divide
from tests import ROOT
from tests.runtime.embed.building import built, command
from tests.runtime.embed.conftest import Open, Write
from tests.runtime.embed.library import Engine, Library, OpenInfo, Prepared, Result, Sizes, StatusError

DEVICES = (b"", b"gpu", b"cuda:", b"cpu*0", b"cpu*65", b"cpu@0", b"cpu@9999", b"cpu*", b"cpu*2x")
PROMPT = "a large red star at the left on blue background"


def refused(library: Library, status: str, name: str, *arguments: Any) -> str:
    """The message of a call that must fail so."""
    with pytest.raises(StatusError) as caught:
        library(name, *arguments)
    assert caught.value.status == status, caught.value
    assert caught.value.message, "no words"
    return caught.value.message


@pytest.fixture
def engine(open_engine: Open) -> Engine:
    return open_engine()


def start(prepared: Prepared, engine: Engine) -> int:
    request = c_uint64()
    engine.library("start", engine.handle, byref(prepared.raw), byref(request))
    return request.value


def wait(engine: Engine, request: int, seconds: float = -1) -> Result:
    result = Result(ctypes.sizeof(Result))
    engine.library("wait", request, seconds, byref(result))
    return result


def test_versions_and_names(library: Library) -> None:
    number = library.c.driffusion_version()
    cmake = (SOURCE / "CMakeLists.txt").read_text()
    assert f"VERSION {number >> 16}.{number >> 8 & 255}.{number & 255} " in cmake
    assert library.c.driffusion_status_name(7) == b"BUFFER"
    assert [library.c.driffusion_status_name(wrong) for wrong in (-1, 16, 2**31 - 1)] == [b"UNKNOWN"] * 3


@pytest.mark.parametrize(
    ("change", "status", "said"),
    [
        ({"abi_version": 2}, "VERSION", "ABI 2"),
        ({"struct_size": 8}, "VERSION", "struct_size is 8"),
        ({"bundle": None}, "ARGUMENT", "info.bundle must not be null"),
        ({"program": None}, "ARGUMENT", "info.program must not be null"),
        ({"option_count": 3}, "ARGUMENT", "info.options must not be null"),
        ({"program": b"nowhere.program"}, "PROGRAM", "nowhere.program cannot be opened"),
        ({"program": str(ROOT).encode()}, "PROGRAM", "is no file"),
        ({"program": __file__.encode()}, "PROGRAM", "no program file"),
        ({"bundle": b"nowhere"}, "BUNDLE", "nowhere/"),
        *(({"devices": text}, "DEVICE", "unknown device") for text in DEVICES),
        ({"devices": b"cuda:999"}, "DEVICE", "no NVIDIA driver" if available() else "there is no cuda:999"),
    ],
)  # fmt: skip
def test_wrong_arguments_of_open(
    library: Library, shapes: Bundle, write: Write, change: dict[str, Any], status: str, said: str
) -> None:
    info = OpenInfo(ctypes.sizeof(OpenInfo), 1, str(shapes.folder).encode(), str(write()).encode(), b"cpu@1")
    for name, value in change.items():
        setattr(info, name, value)
    engine = c_uint64(5)
    assert said in refused(library, status, "open", byref(info), byref(engine))
    assert engine.value == 0
    refused(library, "ARGUMENT", "open", None, byref(engine))
    refused(library, "ARGUMENT", "open", byref(info), None)


@pytest.mark.parametrize(
    ("options", "status", "said"),
    [
        ({"speed": "high"}, "ARGUMENT", "unknown option 'speed'"),
        ({"threads": "0"}, "ARGUMENT", "threads must be a whole number"),
        ({"threads": "two"}, "ARGUMENT", "not 'two'"),
        ({"spin_us": "-1"}, "ARGUMENT", "spin_us"),
        ({"max_requests": "99999999999"}, "ARGUMENT", "max_requests"),
        ({"compiled": "yes"}, "ARGUMENT", "compiled must be auto or no"),
        ({"onnxruntime": "nowhere.so"}, "DEVICE", "option onnxruntime"),
        ({"onnxruntime": "libm.so.6"}, "DEVICE", "no OrtGetApiBase"),
    ],
)
def test_wrong_options(
    library: Library, shapes: Bundle, write: Write, options: dict[str, str], status: str, said: str
) -> None:
    with pytest.raises(StatusError, match=status) as caught:
        library.open(shapes.folder, write(), "cpu@1", options)
    assert said in caught.value.message


def test_a_bundle_that_was_altered(library: Library, shapes: Bundle, write: Write, tmp_path: Path) -> None:
    """A compiled file that does not fit is left aside with a warning; an exported one is an error."""
    copy, program, said = tmp_path / "copy", write(), list[str]()
    shutil.copytree(shapes.folder, copy)
    for path in copy.glob("plans/*/denoiser.onnx"):
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    library.open(copy, program, "cpu@1", log=lambda _, text: said.append(text)).close()
    assert any("sha256 differs); the network" in text or "optimized again" in text for text in said)
    (copy / "denoiser.onnx").write_bytes(b"nothing")
    with pytest.raises(StatusError, match=r"BUNDLE.*its size differs"):
        library.open(copy, program, "cpu@1", {"compiled": "no"})
    (copy / "tokenizer.json").unlink()
    with pytest.raises(StatusError, match=r"BUNDLE.*tokenizer.json cannot be opened"):
        library.open(copy, program, "cpu@1")
    shutil.rmtree(copy)


def test_handles(library: Library, engine: Engine, open_engine: Open) -> None:
    prepared = engine.call(PROMPT)
    request = start(prepared, engine)
    wait(engine, request)
    sizes, needed = Sizes(ctypes.sizeof(Sizes)), c_size_t()
    for wrong in (0, 1 << 60, 2**64 - 1, request):
        refused(library, "HANDLE", "sizes", wrong, 1, byref(sizes))
        refused(library, "HANDLE", "generate", wrong, byref(prepared.raw), None)
        refused(library, "HANDLE", "close", wrong)
    for wrong in (0, engine.handle, request + 1, 2**64 - 1):
        several: dict[str, list[Any]] = {"poll": [None], "wait": [0.0, None], "cancel": [], "release": []}
        for name, arguments in several.items():
            refused(library, "HANDLE", name, wrong, *arguments)
        refused(library, "HANDLE", "request_error", wrong, None, 0, byref(needed))
    library("release", request)
    refused(library, "HANDLE", "release", request)
    other = open_engine()
    library("close", other.handle)
    message = refused(library, "HANDLE", "sizes", other.handle, 1, byref(sizes))
    assert "was closed" in message
    refused(library, "HANDLE", "close", other.handle)
    other.close = lambda: None  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("change", "status", "said"),
    [
        ({"struct_size": 0}, "VERSION", "struct_size is 0"),
        ({"images": 0}, "ARGUMENT", "images must be 1"),
        ({"images": 2**32 - 1}, "ARGUMENT", "images must be 1"),
        ({"guidance": float("inf")}, "ARGUMENT", "guidance"),
        ({"reserved": 1}, "ARGUMENT", "reserved"),
        ({"prompt": None}, "ARGUMENT", "either prompt or token_ids"),
        ({"prompt": b"\xff"}, "ARGUMENT", "prompt is not UTF-8"),
        ({"negative_prompt": b"\xc0\x80"}, "ARGUMENT", "negative_prompt is not UTF-8"),
        ({"rgb": None, "latents_out": None}, "ARGUMENT", "nowhere to put"),
        ({"rgb_bytes": 64 * 64 * 3 - 1}, "BUFFER", "12288 are needed"),
        ({"latents_out_count": 1023}, "BUFFER", "1024 are needed"),
        ({"images": 2}, "BUFFER", "24576 are needed"),
    ],
)
def test_wrong_arguments_of_a_call(engine: Engine, change: dict[str, Any], status: str, said: str) -> None:
    prepared = engine.call(PROMPT)
    for name, value in change.items():
        setattr(prepared.raw, name, value)
    assert said in refused(engine.library, status, "generate", engine.handle, byref(prepared.raw), None)
    request = c_uint64(7)
    refused(engine.library, status, "start", engine.handle, byref(prepared.raw), byref(request))
    assert request.value == 0
    assert not prepared.rgb.any() and not prepared.latents.any()
    refused(engine.library, "ARGUMENT", "generate", engine.handle, None, None)


def test_arrays_of_the_wrong_size_or_content(engine: Engine) -> None:
    ids = [604] + [605] * 31
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"prompt": ids[:-1]}, "token_ids must have 32 numbers, not 31"),
        ({"negative": [*ids, 605]}, "negative_token_ids must have 32 numbers, not 33"),
        ({"latents": np.zeros(1023, np.float32)}, "latents must have 1024"),
        ({"noise": np.zeros(1, np.float32)}, "noise must have 0 numbers"),
        ({"latents": np.full(1024, np.nan, np.float32)}, "latents hold NaN"),
    ]
    for given, said in wrong:
        with pytest.raises(StatusError, match=re.escape(said)):
            engine.generate(**given)
    with pytest.raises(StatusError, match="DEVICE: text_encoder failed in ONNX Runtime"):
        engine.generate([10**6] * 32)  # no row of the embedding: the runtime says so
    assert engine.generate(ids).rgb.any()


def test_a_size_query_draws_nothing(engine: Engine) -> None:
    before, threads = time.process_time(), threading.active_count()
    sizes = [engine.sizes(images) for images in (1, 2, 1024)]
    assert time.process_time() - before < 0.05 and threading.active_count() == threads
    assert [one.rgb_bytes for one in sizes] == [12288, 24576, 1024 * 12288]
    assert [one.latent_count for one in sizes] == [1024, 2048, 1024 * 1024]
    assert (sizes[0].width, sizes[0].height, sizes[0].steps, sizes[0].lanes, sizes[0].token_count) == (64, 64, 4, 2, 32)
    count = c_size_t()
    refused(engine.library, "BUFFER", "tokenize", engine.handle, b"a star", None, 0, byref(count))
    assert count.value == 32
    refused(engine.library, "ARGUMENT", "tokenize", engine.handle, None, None, 0, byref(count))
    refused(engine.library, "ARGUMENT", "sizes", engine.handle, 1, None)


def test_a_request_says_where_it_is_and_what_it_came_to(open_engine: Open) -> None:
    engine = open_engine(num_inference_steps=30)
    prepared, finished = engine.call(PROMPT, seed=3), c_uint32()
    request = start(prepared, engine)
    refused(engine.library, "TIMEOUT", "poll", request, byref(finished))
    refused(engine.library, "TIMEOUT", "wait", request, 0.0, None)
    refused(engine.library, "ARGUMENT", "wait", request, float("nan"), None)
    result = wait(engine, request)
    engine.library("poll", request, byref(finished))
    assert finished.value == 30 and result.rounds == 16
    np.testing.assert_array_equal(prepared.rgb, engine.generate(PROMPT, seed=3).rgb)
    engine.library("cancel", request)  # finished: nothing happens
    wait(engine, request, 1e300)
    engine.library("release", request)


def test_cancel_from_another_thread_and_what_is_said(open_engine: Open) -> None:
    engine = open_engine(num_inference_steps=200)
    prepared, needed = engine.call(PROMPT), c_size_t()
    request = start(prepared, engine)
    time.sleep(0.1)
    engine.library("cancel", request)
    message = refused(engine.library, "CANCELLED", "wait", request, -1.0, None)
    assert re.fullmatch(r"cancelled after \d+ steps", message)
    refused(engine.library, "BUFFER", "request_error", request, None, 0, byref(needed))
    assert needed.value == len(message) + 1
    text = ctypes.create_string_buffer(needed.value)
    engine.library("request_error", request, text, len(text), byref(needed))
    assert text.value.decode() == message
    assert not prepared.rgb.any()
    engine.library("release", request)


@pytest.mark.parametrize("where", ["progress", "preview"])
def test_callbacks_cancel(open_engine: Open, where: str) -> None:
    engine, seen = open_engine(num_inference_steps=20), list[int]()

    def progress(finished: int, steps: int) -> int:
        seen.append(finished)
        return int(finished >= 8)

    given: dict[str, Callable[..., int]] = {
        "progress": {"progress": progress},
        "preview": {"preview": lambda rgb, finished: progress(finished, rgb.size)},
    }[where]  # type: ignore[assignment]
    with pytest.raises(StatusError, match="CANCELLED: cancelled by a callback after 8 steps"):
        engine.generate(PROMPT, **given)
    assert seen == [2, 4, 6, 8]


def test_previews_are_the_image_so_far(open_engine: Open) -> None:
    engine, seen = open_engine(num_inference_steps=21), dict[int, Any]()
    made = engine.generate(PROMPT, preview=lambda rgb, finished: bool(seen.update({finished: rgb})), preview_every=6)
    assert list(seen) == [6, 12, 18]
    distances = [np.abs(rgb.astype(int) - made.rgb[0]).mean() for rgb in seen.values()]
    assert distances == sorted(distances, reverse=True) and 0 < distances[-1] < 40


def test_what_a_callback_may_not_do(open_engine: Open, shapes: Bundle) -> None:
    engine, said = open_engine(num_inference_steps=2), list[str]()
    other = engine.call(PROMPT)
    running = start(other, engine)

    def progress(finished: int, steps: int) -> int:
        forbidden: dict[str, list[Any]] = {
            "generate": [engine.handle, byref(other.raw), None], "close": [engine.handle], "wait": [running, 0.0, None],
            "release": [running],
        }  # fmt: skip
        for name, arguments in forbidden.items():
            said.append(refused(engine.library, "STATE", name, *arguments))
        engine.sizes()
        engine.library("cancel", running)
        return 0

    engine.generate(PROMPT, progress=progress)
    assert said and all("inside a callback" in text for text in said)
    engine.library("release", running)


def test_release_and_close_while_it_runs(library: Library, shapes: Bundle, write: Write) -> None:
    program = write(num_inference_steps=300)
    engine = library.open(shapes.folder, program, "cpu*2")
    first, second, third = (engine.call(PROMPT, seed=n) for n in range(3))
    library("release", start(first, engine))  # cancels, waits
    request, before = start(second, engine), time.perf_counter()
    with ThreadPoolExecutor() as pool:
        blocked = pool.submit(library, "generate", engine.handle, byref(third.raw), None)
        time.sleep(0.2)
        engine.close()
        with pytest.raises(StatusError, match="CANCELLED"):
            blocked.result()
    assert time.perf_counter() - before < 5
    refused(library, "CANCELLED", "poll", request, None)
    refused(library, "CANCELLED", "wait", request, -1.0, None)
    library("release", request)


def test_too_many_requests(library: Library, shapes: Bundle, write: Write) -> None:
    engine = library.open(shapes.folder, write(num_inference_steps=300), "cpu*2", {"max_requests": "2"})
    calls = [engine.call(PROMPT) for _ in range(3)]
    requests = [start(one, engine) for one in calls[:2]]
    message = refused(library, "BUSY", "generate", engine.handle, byref(calls[2].raw), None)
    assert "option max_requests" in message
    for request in requests:
        library("release", request)
    engine.close()


def test_threads_share_lanes_and_their_images_stay_their_own(open_engine: Open) -> None:
    """Two engines, four threads each: as alone, to rounding, because on fewer lanes calls have other batches."""
    engines = [open_engine(num_inference_steps=12), open_engine("cpu*3", num_inference_steps=12, mode="sequential")]
    alone = {(n, seed): one.generate(PROMPT, seed=seed).rgb for n, one in enumerate(engines) for seed in range(4)}
    with ThreadPoolExecutor(8) as pool:
        jobs = {key: pool.submit(engines[key[0]].generate, PROMPT, seed=key[1]) for key in alone}
        lanes = []
        for key, job in jobs.items():
            made = job.result()
            lanes.append(made.result.lanes_per_round)
            assert np.abs(made.rgb.astype(int) - alone[key]).max() <= 2
    assert min(lanes) < 2  # some of them did share


def test_errors_are_of_their_thread(engine: Engine) -> None:
    refused(engine.library, "HANDLE", "close", 12345)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(engine.library.c.driffusion_last_error).result() == b""
    assert b"12345" in engine.library.c.driffusion_last_error()


def test_signals_stay_the_hosts(library: Library, shapes: Bundle, write: Write) -> None:
    def dispositions() -> list[str]:
        text = Path("/proc/self/status").read_text()
        return re.findall(r"^Sig(?:Blk|Ign|Cgt):\s*(\w+)$", text, re.MULTILINE)

    before, handlers = dispositions(), [signal.getsignal(n) for n in range(1, 32)]
    here = {path.name for path in Path("/proc/self/task").iterdir()}
    engine = library.open(shapes.folder, write(num_inference_steps=40), "cpu*3")
    engine.generate(PROMPT)
    request = start(prepared := engine.call(PROMPT), engine)
    started = [path for path in Path("/proc/self/task").iterdir() if path.name not in here]
    masks = [re.search(r"^SigBlk:\s*(\w+)$", (path / "status").read_text(), re.MULTILINE) for path in started]
    blocked = [int(mask[1], 16) & 1 << signal.SIGINT - 1 for mask in masks if mask]
    assert len(blocked) >= 2 and all(blocked)  # of lanes, of ONNX Runtime and of the request
    wait(engine, request)
    assert prepared.rgb.any()
    library("release", request)
    engine.close()
    assert (dispositions(), [signal.getsignal(n) for n in range(1, 32)]) == (before, handlers)


def test_exported_symbols(library: Library) -> None:
    """The committed list, and nothing of C++, NumPy or anything else."""
    lines = command("nm", "-D", "--defined-only", built()).splitlines()
    found = sorted(
        line.split()[-1] for line in lines if " T " in line or " D " in line or " B " in line or " W " in line
    )
    nodes = re.findall(r"(DRIFFUSION_\w+) \{(.*?)\}", (SOURCE / "driffusion.map").read_text(), re.DOTALL)
    versions = {name: node for node, body in nodes for name in re.findall(r"driffusion_\w+(?=;)", body)}
    listed = sorted(versions)
    assert found == [f"{name}@@{versions[name]}" for name in listed]
    declared = sorted(
        re.findall(r"^DRIFFUSION_API .*?(driffusion_\w+)\(", (SOURCE / "include/driffusion.h").read_text(), re.M)
    )
    assert declared == listed
    needed = command("readelf", "-d", built())
    assert "python" not in needed and "onnxruntime" not in needed


@pytest.mark.parametrize(
    "compiler", ["gcc -std=c11", "g++ -std=c++17", "g++ -std=c++20", "clang -std=c11", "clang++ -std=c++17"]
)
def test_the_headers_compile_alone(tmp_path: Path, compiler: str) -> None:
    name, standard = compiler.split()
    if not shutil.which(name):
        pytest.skip(f"{name} is not installed")
    plus = "++" in name
    source = tmp_path / ("one.cc" if plus else "one.c")
    source.write_text(f"#include <driffusion.h{'pp' if plus else ''}>\nint main(void) {{ return 0; }}\n")
    flags = ["-Wall", "-Wextra", "-Wpedantic", "-Werror", "-fsyntax-only", f"-I{SOURCE / 'include'}"]
    command(name, standard, *flags, source)


def test_the_lanes_are_divided_by_pythons_rule(rng: np.random.Generator) -> None:
    """The two functions of the rule, against `runtime.lane_policy` on random numbers."""
    lines, expected = [], []
    for _ in range(300):
        lanes = int(rng.integers(1, 9))
        images = rng.uniform(0.1, 5, (int(rng.integers(1, 12)), lanes))
        owned = rng.permutation(lanes)[: int(rng.integers(1, lanes + 1))].tolist()
        lines.append(
            f"{lanes} {len(images)} {' '.join(map(str, images.ravel()))} {len(owned)} {' '.join(map(str, owned))}"
        )
        own = divide(lanes, owned)
        rule = at_once(images.tolist(), lanes)
        expected.append(f"{rule} " + " ".join(f"{lane}:{','.join(map(str, own[lane]))}" for lane in sorted(own)))
    run = subprocess.run([built("tests/check_lanes")], input="\n".join(lines), capture_output=True, text=True)
    assert run.stdout.split("\n")[:-1] == expected


MEMORY = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
from tests.runtime.embed.library import Library
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
library, sizes = Library(Path({library!r})), []
for turn in range(60):
    engine = library.open(Path({bundle!r}), Path({program!r}), "cpu*2")
    engine.generate("a star")
    engine.close()
    sizes.append(resident())
threads = len(list(Path("/proc/self/task").iterdir()))
print((max(sizes[5:]) - sizes[4]) >> 20, threads, len(list(Path("/proc/self/fd").iterdir())))
"""


@pytest.mark.slow
def test_opened_and_closed_sixty_times(library: Library, shapes: Bundle, write: Write) -> None:
    program = write(num_inference_steps=1)
    code = MEMORY.format(root=str(ROOT), library=str(built()), bundle=str(shapes.folder), program=str(program))
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    grown, threads, files = map(int, run.stdout.split())
    assert grown < 20 and threads <= 1 + cores() and files < 12, run.stdout
