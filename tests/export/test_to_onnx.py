"""Parity of an export with torch, and the memory that it takes."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from engines.errors import DeviceError, ExportError

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers and transformers, about themselves


def test_memory_grows_with_weights_and_with_pixels() -> None:
    from export.families import Sides
    from export.to_onnx import BATCHES, FEW, compared, memory

    small, large = Sides(512, 256, 1024, 64), Sides(1024, 512, 2048, 64)
    xl = memory("denoiser", 5_140_000_000, "fp16", large, 8)
    assert 13e9 < xl < 20e9, "measured: bench/results/export.json"
    assert xl > memory("denoiser", 1_720_000_000, "fp16", small, 8) > 6.5e9
    assert memory("vae_decoder", 10**8, "fp32", large, 8) > memory("vae_decoder", 10**8, "fp32", small, 8) + 3e9
    assert compared("denoiser", 10**8, large) == BATCHES and compared("vae_decoder", 10**8, large) == FEW


def identity_model(path: Path) -> Path:
    """An ONNX file that gives what it is given."""
    import onnx
    from onnx import helper

    value = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch"]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "identity", value[:1], value[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path)
    return path


@pytest.mark.parametrize(
    ("given", "expected", "message"),
    [
        ([1.0, -4.0], [1.0, -4.5], "net: ONNX Runtime differs from torch by 0.5 in y, whose scale is 4.5; allowed is"),
        ([1.0, np.nan], [1.0, 2.0], "net: ONNX Runtime differs from torch by inf in y"),
        ([1.0, 2.0], [1.0, np.nan], "net: ONNX Runtime differs from torch by inf in y"),
        ([1.0, np.inf], [1.0, np.inf], "net: ONNX Runtime differs from torch by inf in y"),
        ([1.0, 2.0], [1.0], "net: ONNX Runtime"),
    ],
)
def test_an_export_that_differs_from_torch_is_refused(
    given: list[float], expected: list[float], message: str, tmp_path: Path
) -> None:
    from export.to_onnx import measure_parity

    pairs = tmp_path / "pairs.npz"
    np.savez(pairs, **{"in/0/x": np.float32(given), "out/0/y": np.float32(expected)})  # type: ignore[arg-type]
    with pytest.raises(ExportError, match=re.escape(message)):
        measure_parity("net", identity_model(tmp_path / "net.onnx"), pairs, 0.1, (1,))


def test_an_export_that_equals_torch_says_by_how_much(tmp_path: Path) -> None:
    from export.to_onnx import measure_parity

    pairs = tmp_path / "pairs.npz"
    np.savez(pairs, **{"in/0/x": np.float32([1, -4]), "out/0/y": np.float32([1, -4.25])})  # type: ignore[arg-type]
    found = measure_parity("net", identity_model(tmp_path / "net.onnx"), pairs, 0.1, (1,))
    assert found.relative_error == pytest.approx(0.25 / 4.25) and found.max_abs_error == 0.25


def test_a_comparison_that_the_system_kills_is_the_machines_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from export import to_onnx

    monkeypatch.setattr(to_onnx, "sys", SimpleNamespace(executable=str(killed := tmp_path / "python")))
    killed.write_text("#!/bin/sh\nkill -9 $$\n")
    killed.chmod(0o755)
    with pytest.raises(DeviceError, match=r"net: ONNX Runtime was ended by signal 9 .* goes on from here"):
        to_onnx.measure_parity("net", tmp_path / "net.onnx", tmp_path / "pairs.npz", 0.1, (1,))
