"""`libdriffusion` through ctypes, with the structs of its header, for tests and benchmarks."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Mapping, Sequence
from ctypes import POINTER, byref, c_char_p, c_double, c_size_t, c_uint32, c_uint64, c_void_p
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Log = ctypes.CFUNCTYPE(None, c_void_p, ctypes.c_int, c_char_p)
Progress = ctypes.CFUNCTYPE(ctypes.c_int, c_void_p, c_uint32, c_uint32)
Preview = ctypes.CFUNCTYPE(ctypes.c_int, c_void_p, POINTER(ctypes.c_uint8), c_uint32, c_uint32, c_uint32)
STATUSES = (
    "OK", "ARGUMENT", "HANDLE", "VERSION", "PROGRAM", "BUNDLE", "DEVICE", "BUFFER", "CANCELLED", "NONFINITE", "BUSY",
    "TIMEOUT", "MEMORY", "STATE", "UNSUPPORTED", "INTERNAL",
)  # fmt: skip


class Option(ctypes.Structure):
    _fields_ = [("key", c_char_p), ("value", c_char_p)]


class OpenInfo(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_uint32), ("abi_version", c_uint32), ("bundle", c_char_p), ("program", c_char_p),
        ("devices", c_char_p), ("options", POINTER(Option)), ("option_count", c_size_t), ("log", Log),
        ("log_user", c_void_p),
    ]  # fmt: skip


class Sizes(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_uint32), ("width", c_uint32), ("height", c_uint32), ("steps", c_uint32), ("lanes", c_uint32),
        ("token_count", c_uint32), ("rgb_bytes", c_uint64), ("latent_count", c_uint64), ("noise_count", c_uint64),
    ]  # fmt: skip


class Call(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_uint32), ("images", c_uint32), ("seed", c_uint64), ("guidance", c_double),
        ("prompt", c_char_p), ("negative_prompt", c_char_p), ("token_ids", c_void_p),
        ("negative_token_ids", c_void_p), ("token_count", c_size_t), ("negative_token_count", c_size_t),
        ("latents", c_void_p), ("latent_count", c_size_t), ("noise", c_void_p), ("noise_count", c_size_t),
        ("rgb", c_void_p), ("rgb_bytes", c_size_t), ("latents_out", c_void_p), ("latents_out_count", c_size_t),
        ("progress", Progress), ("preview", Preview), ("user", c_void_p), ("preview_every", c_uint32),
        ("reserved", c_uint32), ("device_rgb", c_uint64), ("device_rgb_bytes", c_size_t), ("device_latents", c_uint64),
        ("device_latents_count", c_size_t), ("stream", c_void_p), ("event", c_void_p),
    ]  # fmt: skip


class Result(ctypes.Structure):
    _fields_ = [
        ("struct_size", c_uint32), ("rounds", c_uint32), ("evaluations", c_uint32), ("calls", c_uint32),
        ("truncated", c_uint32), ("lanes_per_round", c_double), ("text_seconds", c_double), ("wait_seconds", c_double),
        ("denoise_seconds", c_double), ("decode_seconds", c_double), ("total_seconds", c_double),
        ("critical_seconds", c_double),
    ]  # fmt: skip


class StatusError(Exception):
    """A status that is not OK."""

    def __init__(self, status: str, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status, self.message = status, message


class Library:
    """The loaded library."""

    def __init__(self, path: Path) -> None:
        self.c = ctypes.CDLL(str(path))
        self.c.driffusion_last_error.restype = c_char_p
        self.c.driffusion_status_name.restype = c_char_p
        self.c.driffusion_version.restype = c_uint32
        engine, request = c_uint64, c_uint64
        for name, types in {
            "open": [c_void_p, c_void_p], "close": [engine], "sizes": [engine, c_uint32, c_void_p],
            "tokenize": [engine, c_char_p, c_void_p, c_size_t, c_void_p], "generate": [engine, c_void_p, c_void_p],
            "start": [engine, c_void_p, c_void_p], "wait": [request, c_double, c_void_p],
            "wait_enqueued": [request, c_double], "poll": [request, c_void_p],
            "cancel": [request], "release": [request], "request_error": [request, c_void_p, c_size_t, c_void_p],
        }.items():  # fmt: skip
            getattr(self.c, f"driffusion_{name}").argtypes = types

    def __call__(self, name: str, *arguments: Any) -> None:
        """Calls a function; StatusError for any status but OK."""
        status = getattr(self.c, f"driffusion_{name}")(*arguments)
        if status:
            raise StatusError(STATUSES[status], self.c.driffusion_last_error().decode())

    def open(
        self, bundle: Path, program: Path, devices: str | None = None, options: Mapping[str, str] | None = None,
        log: Callable[[int, str], None] | None = None,
    ) -> Engine:  # fmt: skip
        """An engine."""
        pairs = [Option(key.encode(), value.encode()) for key, value in (options or {}).items()]
        array = (Option * len(pairs))(*pairs)
        taken = Log(lambda _, level, text: log(level, text.decode())) if log else Log()
        info = OpenInfo(
            ctypes.sizeof(OpenInfo), 1, str(bundle).encode(), str(program).encode(),
            devices.encode() if devices else None, array, len(pairs), taken, None,
        )  # fmt: skip
        handle = c_uint64()
        self("open", byref(info), byref(handle))
        return Engine(self, handle.value, taken)


class Engine:
    """A handle with the buffers that its calls need."""

    def __init__(self, library: Library, handle: int, log: Any) -> None:
        self.library, self.handle, self._log = library, handle, log
        self._started: list[Prepared] = []  # whose buffers are written to

    def sizes(self, images: int = 1) -> Sizes:
        sizes = Sizes(ctypes.sizeof(Sizes))
        self.library("sizes", self.handle, images, byref(sizes))
        return sizes

    def tokenize(self, text: str) -> list[int]:
        ids = np.zeros(self.sizes().token_count, np.int64)
        count = c_size_t()
        self.library("tokenize", self.handle, text.encode(), ids.ctypes.data, len(ids), byref(count))
        return ids[: count.value].tolist()  # type: ignore[no-any-return]

    def call(
        self,
        prompt: str | Sequence[int] | None = "",
        *,
        negative: str | Sequence[int] | None = None,
        seed: int = 0,
        guidance: float = math.nan,
        images: int = 1,
        latents: NDArray[np.float32] | None = None,
        noise: NDArray[np.float32] | None = None,
        progress: Callable[[int, int], int] | None = None,
        preview: Callable[[NDArray[np.uint8], int], int] | None = None,
        preview_every: int = 0,
        **raw: int,
    ) -> Prepared:
        """A call with its buffers; `raw` are further fields of the struct."""
        return Prepared(self, locals())

    def generate(self, *arguments: Any, **options: Any) -> Prepared:
        """Makes images here."""
        made = self.call(*arguments, **options)
        self.library("generate", self.handle, byref(made.raw), byref(made.result))
        return made

    def start(self, made: Prepared) -> int:
        """Makes images in a thread of the library; the request."""
        request = c_uint64()
        self._started.append(made)
        self.library("start", self.handle, byref(made.raw), byref(request))
        return request.value

    def close(self) -> None:
        self.library("close", self.handle)


class Prepared:
    """The struct of a call, what it points to, and what comes out."""

    def __init__(self, engine: Engine, given: dict[str, Any]) -> None:
        sizes = engine.sizes(given["images"])
        self.rgb = np.zeros((given["images"], sizes.height, sizes.width, 3), np.uint8)
        self.latents = np.zeros(sizes.latent_count, np.float32)
        self.result = Result(ctypes.sizeof(Result))
        raw = self.raw = Call(ctypes.sizeof(Call), given["images"], given["seed"], given["guidance"])
        self._kept: list[Any] = []
        for text, ids, name in (
            ("prompt", "token_ids", "prompt"),
            ("negative_prompt", "negative_token_ids", "negative"),
        ):
            value = given[name]
            if isinstance(value, str):
                setattr(raw, text, value.encode())
            elif value is not None:
                setattr(raw, ids, self._array(value, np.int64))
                setattr(raw, ids.replace("ids", "count"), len(value))
        for name in ("latents", "noise"):
            if given[name] is not None:
                setattr(raw, name, self._array(given[name], np.float32))
                setattr(raw, f"{name}_count".replace("latents", "latent"), given[name].size)
        raw.rgb, raw.rgb_bytes = self.rgb.ctypes.data, self.rgb.size
        raw.latents_out, raw.latents_out_count = self.latents.ctypes.data, self.latents.size
        if (progress := given["progress"]) is not None:
            raw.progress = Progress(lambda _, finished, steps: progress(finished, steps))
        if (preview := given["preview"]) is not None:

            def seen(_: Any, rgb: Any, width: int, height: int, finished: int) -> int:
                return preview(np.ctypeslib.as_array(rgb, (height, width, 3)).copy(), finished)  # type: ignore[no-any-return]

            raw.preview = Preview(seen)
        raw.preview_every = given["preview_every"]
        for name, value in given["raw"].items():
            setattr(raw, name, value)

    def _array(self, value: Any, dtype: Any) -> int:
        array = np.ascontiguousarray(value, dtype)
        self._kept.append(array)
        return int(array.ctypes.data)
