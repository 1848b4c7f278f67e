"""A torch module to an ONNX file, and the proof that they compute the same."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch

from engines.errors import ExportError
from engines.manifest import Network, Parity, TensorSpec, sha256_file
from export.models import MAX_BATCH, NetworkExport

OPSET = 20  # the newest that needs no Attention operator, which TensorRT-RTX cannot build
# of the output's scale; every layer rounds to 5e-4 in half and to 4e-3 in bfloat16
PARITY_BOUND = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 1e-1}
PARITY_BATCHES = (1, 3, 4)


def export_network(name: str, network: NetworkExport, folder: Path, precision: str) -> Network:
    """Writes `<name>.onnx` with a dynamic batch axis and measures it against torch.

    ExportError when the largest difference exceeds PARITY_BOUND of the output's scale, or is not finite.
    """
    path = folder / f"{name}.onnx"
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    network.module.eval()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            network.module,
            network.example(2),
            dynamo=True,
            opset_version=OPSET,
            input_names=list(network.inputs),
            output_names=[network.output],
            dynamic_shapes=tuple({0: batch} for _ in network.inputs),
            verbose=False,
        )
    assert program is not None
    program.save(path, external_data=False)
    graph = onnx.load(path, load_external_data=False).graph
    return Network(
        file=path.name,
        sha256=sha256_file(path),
        bytes=path.stat().st_size,
        inputs=tuple(_spec(value) for value in graph.input),
        outputs=tuple(_spec(value) for value in graph.output),
        parity=measure_parity(name, network, path, PARITY_BOUND[precision]),
    )


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    tensor = value.type.tensor_type
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)).name
    # the first axis is the batch in every network; exporters sometimes rename it on outputs
    rest = [axis.dim_param or int(axis.dim_value) for axis in tensor.shape.dim[1:]]
    return TensorSpec(name=value.name, dtype=dtype, shape=("batch", *rest))


def _widened(model: onnx.ModelProto) -> bytes | None:
    """A bfloat16 model with float32 in its place everywhere; None for a model without bfloat16."""
    narrow, wide = onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT
    graph, found = model.graph, False
    tensors = [*graph.initializer, *(a.t for node in graph.node for a in node.attribute if a.HasField("t"))]
    for tensor in tensors:
        if tensor.data_type == narrow:
            values = onnx.numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
            found = True
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.type.tensor_type.elem_type == narrow:
            value.type.tensor_type.elem_type = wide
    for node in graph.node:
        for attribute in node.attribute:
            if (
                attribute.type == onnx.AttributeProto.INT
                and attribute.name in ("to", "dtype")
                and attribute.i == narrow
            ):
                attribute.i = wide
    return model.SerializeToString() if found else None


@torch.no_grad()
def measure_parity(name: str, network: NetworkExport, path: Path, bound: float) -> Parity:
    """ONNX Runtime against torch on fresh random inputs of several batch sizes.

    ONNX Runtime has few bfloat16 kernels for processors, so such a graph runs in float32, with the same weights.
    """
    model = onnx.load(path)
    wide = _widened(model)
    session = onnxruntime.InferenceSession(wide or path, providers=["CPUExecutionProvider"])
    error = scale = 0.0
    for batch in PARITY_BATCHES:
        inputs = network.example(batch)
        expected = network.module(*inputs).float().numpy()
        feeds = {
            key: (value.float() if value.dtype == torch.bfloat16 else value).numpy()
            for key, value in zip(network.inputs, inputs, strict=True)
        }
        actual = session.run(None, feeds)[0]
        error = max(error, float(np.abs(actual - expected).max()))
        scale = max(scale, float(np.abs(expected).max()))
    parity = Parity(max_abs_error=error, scale=scale, bound=bound, batches=PARITY_BATCHES)
    if not parity.relative_error <= bound:
        raise ExportError(
            f"{name}: ONNX Runtime differs from torch by {error:.3g} where the output's scale is {scale:.3g}; "
            f"allowed is {bound:g} of it"
        )
    return parity
