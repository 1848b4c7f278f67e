"""`python -m export.parity FILE.onnx PAIRS.npz`: ONNX Runtime on saved inputs against saved outputs.

A process of its own, without torch, so that only one of the two has the weights in memory. Prints, per output, the
largest error and the largest value.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime


def widened(path: Path, folder: Path) -> Path:
    """A bfloat16 model with float32 in its place everywhere, written to a folder; another model as it is.

    ONNX Runtime has few bfloat16 kernels for processors, so such a graph runs in float32, with the same weights.
    """
    narrow, wide = onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT
    graph = onnx.load(path, load_external_data=False).graph
    kinds = {tensor.data_type for tensor in graph.initializer}
    kinds |= {value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)}
    if narrow not in kinds:
        return path
    model = onnx.load(path)
    graph = model.graph
    for tensor in [*graph.initializer, *(a.t for node in graph.node for a in node.attribute if a.HasField("t"))]:
        if tensor.data_type == narrow:
            values = onnx.numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.type.tensor_type.elem_type == narrow:
            value.type.tensor_type.elem_type = wide
    for node in graph.node:
        for attribute in node.attribute:
            cast = attribute.type == onnx.AttributeProto.INT and attribute.name in ("to", "dtype")
            if cast and attribute.i == narrow:
                attribute.i = wide
    wider = folder / "wide.onnx"
    onnx.save(model, wider, save_as_external_data=True, location="wide.data")
    return wider


def differences(path: Path, pairs: Path) -> dict[str, tuple[float, float]]:
    """Per output, the largest error and the largest expected value over all pairs; infinite for NaN on any side."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(widened(path, pairs.parent), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    found = dict.fromkeys(names, (0.0, 0.0))
    with np.load(pairs) as saved:
        numbers = sorted({int(key.split("/")[1]) for key in saved})
        for number in numbers:
            prefix = f"in/{number}/"
            feeds = {key.removeprefix(prefix): saved[key] for key in saved if key.startswith(prefix)}
            for name, actual in zip(names, session.run(None, feeds), strict=True):
                expected = saved[f"out/{number}/{name}"]
                error = float(np.abs(actual.astype(np.float32) - expected).max())
                if not np.isfinite(error) or actual.shape != expected.shape:
                    error = float("inf")
                before = found[name]
                found[name] = max(before[0], error), max(before[1], float(np.abs(expected).max()))
    return found


if __name__ == "__main__":
    json.dump(differences(Path(sys.argv[1]), Path(sys.argv[2])), sys.stdout)
