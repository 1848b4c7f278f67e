"""Which inference runtimes work on this card, and the embedded model end to end on those that do."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.gpu.device import DeviceBench
from bench.gpu.engine import FASTEST, distance
from bench.gpu.parts import NotPossibleError, Row, Settings, open_driver
from bench.statistics import percentiles, ratio
from engines.cuda.driver import Driver
from engines.errors import DeviceError, EngineError

if TYPE_CHECKING:
    from runtime.pipeline import Pipeline, Result
    from runtime.sampling.operations import Options

WIDTH, ROWS = 64, 16
UNSUPPORTED = "does not support this compute capability"  # TensorRT-RTX, where it loads a plan
PROMPT = "a large red star at the left on blue background"


def tensorrt(settings: Settings) -> Iterator[Row]:
    """TensorRT: whether a plan is built, loaded, run, right and captured on the first GPU."""
    return _loads("tensorrt", settings)


def tensorrt_rtx(settings: Settings) -> Iterator[Row]:
    """TensorRT-RTX, which does not list data-centre cards: every way to name the card that is here."""
    return _loads("tensorrt_rtx", settings)


def _loads(name: str, settings: Settings) -> Iterator[Row]:
    driver = open_driver()
    if importlib.util.find_spec(name) is None:
        raise NotPossibleError(f"{name} is not installed")
    trt = importlib.import_module(name)
    yield {"package": name, "version": trt.__version__}
    weights = np.random.default_rng().standard_normal((WIDTH, WIDTH)).astype(np.float16) / 8
    bench = DeviceBench(driver, settings.cache, "float16")
    works, reasons = 0, []
    for target in _targets(trt, bench.device.capability):
        row: Row = {
            "target": target or "as it comes",
            "built": False,
            "loaded": False,
            "right": False,
            "captured": False,
        }
        row |= _one_plan(trt, target, bench, weights)
        works += row["right"]
        reasons.append(str(row.get("reason")))
        yield row
    bench.close()
    if all(UNSUPPORTED in reason for reason in reasons):
        capability = ".".join(map(str, bench.device.capability))
        raise NotPossibleError(f"{name} {trt.__version__} supports no cards of capability {capability}")
    assert works, f"{name} runs no plan on {bench.device.name}"


def _targets(trt: Any, capability: tuple[int, int]) -> list[str | None]:
    """Names of compute capabilities to build for; None leaves it to the package."""
    if not hasattr(trt, "ComputeCapability"):
        return [None]
    named = f"SM{capability[0]}{capability[1]}"
    return [*([named] if hasattr(trt.ComputeCapability, named) else []), "CURRENT", None]


def _one_plan(trt: Any, target: str | None, bench: DeviceBench, weights: Any) -> Row:
    """ReLU(x · W) in fp16 of up to 16 rows: what became of it."""
    messages: list[str] = []

    class Logger(trt.ILogger):  # type: ignore[misc]
        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                messages.append(message)

    logger = Logger()
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    x = network.add_input("x", trt.float16, (-1, WIDTH))
    constant = network.add_constant((WIDTH, WIDTH), trt.Weights(weights)).get_output(0)
    none = trt.MatrixOperation.NONE
    product = network.add_matrix_multiply(x, none, constant, none).get_output(0)
    y = network.add_activation(product, trt.ActivationType.RELU).get_output(0)
    y.name = "y"
    network.mark_output(y)
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    profile.set_shape("x", (1, WIDTH), (4, WIDTH), (ROWS, WIDTH))
    config.add_optimization_profile(profile)
    if target is not None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, target), 0)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        return {"reason": "; ".join(messages[-2:])}
    engine = trt.Runtime(logger).deserialize_cuda_engine(bytes(plan))
    if engine is None:
        return {"built": True, "reason": "; ".join(messages[-2:])}
    context = engine.create_execution_context()
    if context is None:
        return {"built": True, "loaded": True, "reason": "; ".join(messages[-2:])}
    row = _runs(context, bench, weights)
    return {"built": True, "loaded": True, "scratch_bytes": int(engine.device_memory_size_v2), **row}


def _runs(context: Any, bench: DeviceBench, weights: Any) -> Row:
    """Runs on a stream of ours, then as a graph; both are compared with float64."""
    driver, rng, size = bench.driver, np.random.default_rng(), 2 * ROWS * WIDTH
    source, target = bench.allocate(size), bench.allocate(size)
    context.set_input_shape("x", (ROWS, WIDTH))
    context.set_tensor_address("x", source)
    context.set_tensor_address("y", target)

    def right(run: Any) -> bool:
        value = rng.standard_normal((ROWS, WIDTH)).astype(np.float16)
        bench.to_device(source, value)
        run()
        bench.settle()
        got = bench.to_host(target, size).view(np.float16).reshape(ROWS, WIDTH).astype(np.float64)
        wanted = np.maximum(value.astype(np.float64) @ weights.astype(np.float64), 0)
        return bool(np.abs(got - wanted).max() < 2e-2)

    def execute() -> None:
        if not context.execute_async_v3(int(bench.stream)):
            raise DeviceError("execute_async_v3 failed")

    row: Row = {"right": right(execute)}
    if hasattr(context, "is_stream_capturable"):
        row["says_capturable"] = bool(context.is_stream_capturable(int(bench.stream)))
    try:
        graph = driver.capture(bench.stream, execute)
        row["captured"] = right(lambda: driver("cuGraphLaunch", graph, bench.stream))
        driver("cuGraphExecDestroy", graph)
    except DeviceError as error:
        row["reason"] = str(error)
    bench.free([source, target])
    return row


def onnxruntime(settings: Settings) -> Iterator[Row]:
    """Whether the CUDA provider opens the embedded model's text encoder and agrees with the processor."""
    open_driver()
    _needs_provider()
    from engines.cuda.onnxruntime import open_session

    bundle = _bundle("fp32")
    network = bundle.manifest.networks["text_encoder"]
    path = str(bundle.onnx("text_encoder"))
    found = open_session(path, "text_encoder", 0)
    import onnxruntime as library

    cpu = library.InferenceSession(path, providers=["CPUExecutionProvider"])
    rng, ids = np.random.default_rng(), {one.input for one in bundle.manifest.tokenizers}
    shapes = {one.name: (one.resolve({"batch": 2}), one.dtype) for one in network.inputs}
    inputs = {
        name: rng.integers(0, 100 if name in ids else 1, shape).astype(dtype) for name, (shape, dtype) in shapes.items()
    }
    outputs = [session.run(None, inputs)[0] for session in (found, cpu)]
    off = distance(np.asarray(outputs[0], np.float32), np.asarray(outputs[1], np.float32))
    yield {"version": library.__version__, "providers": found.get_providers(), "distance_to_cpu": off}
    assert off < 1e-2, f"the text encoder is {off:.3g} away from the processor's"


def _needs_provider() -> None:
    if importlib.util.find_spec("onnxruntime") is None:
        raise NotPossibleError("onnxruntime is not installed")
    import onnxruntime as library

    if "CUDAExecutionProvider" not in library.get_available_providers():
        raise NotPossibleError(f"onnxruntime {library.__version__} was built without CUDA: install onnxruntime-gpu")


def _bundle(precision: str) -> Any:
    from engines.store import BUILD, Bundle

    try:
        return Bundle.open("shapes", BUILD, precision)
    except EngineError as error:
        raise NotPossibleError(str(error)) from None


def shapes_on_tensorrt(settings: Settings) -> Iterator[Row]:
    """Plans are built for this card if need be."""
    return _on_plans("tensorrt", settings)


def shapes_on_tensorrt_rtx(settings: Settings) -> Iterator[Row]:
    """The same on the package for RTX cards."""
    return _on_plans("tensorrt_rtx", settings)


def _on_plans(runtime: str, settings: Settings) -> Iterator[Row]:
    from engines.runtimes import RUNTIMES

    driver = open_driver()
    if not RUNTIMES[runtime].installed:
        raise NotPossibleError(f"{runtime} is not installed")
    from engines.nvidia import visible_gpus
    from engines.tensorrt.build import unfit

    if reason := unfit(importlib.import_module(runtime), visible_gpus()[0]):
        raise NotPossibleError(reason)
    return _pipelines(f"@{runtime}", settings, driver)


def shapes_on_onnxruntime(settings: Settings) -> Iterator[Row]:
    """The CUDA provider as lanes."""
    driver = open_driver()
    _needs_provider()
    return _pipelines("@onnxruntime", settings, driver)


def _pipelines(suffix: str, settings: Settings, driver: Driver) -> Iterator[Row]:
    """Seconds of every sampler on lanes of one card, then one lane on every card; pixels against the processor's."""
    from engines.devices import parse_devices
    from engines.load import build_missing
    from runtime.pipeline import Pipeline

    bundle = _bundle("fp16")
    first = f"cuda:0{suffix}"
    for name, plan in build_missing(bundle, parse_devices(first)).items():
        yield {
            "plan": name,
            "built_in_seconds": plan.build_seconds if plan else None,
            "bytes": plan.bytes if plan else None,
        }
    reference = _images_on_cpu(settings)
    devices = [first if count == 1 else f"{first}*{count}" for count in settings.lanes]
    if driver.count > 1:
        devices.append(",".join(f"cuda:{n}{suffix}" for n in range(driver.count)))
    one_lane: dict[str, list[float]] = {}
    for lanes in devices:
        pipeline = Pipeline.load("shapes", lanes)
        try:
            yield from _modes(pipeline, lanes, settings, reference, one_lane)
        finally:
            pipeline.close()


def _modes(
    pipeline: Any, lanes: str, settings: Settings, reference: dict[str, Any], one_lane: dict[str, list[float]]
) -> Iterator[Row]:  # fmt: skip
    for mode, options in FASTEST:
        results = [_generate(pipeline, mode, options, settings) for _ in range(settings.repeats + 2)]
        result, seconds = results[-1], [one.report.seconds["denoise"] for one in results]
        one_lane.setdefault(mode, seconds[2:])
        pixels = np.asarray(result.images[0], np.float32)
        row: Row = {
            "devices": lanes, "mode": mode, "rounds": result.report.rounds, "seconds": percentiles(seconds[2:]),
            "speedup_over_one_lane_sequential": ratio(one_lane["sequential"], seconds[2:]),
        }  # fmt: skip
        if mode in reference:
            row["largest_pixel_difference"] = float(np.abs(pixels - reference[mode]).max())
            row["mean_pixel_difference"] = float(np.abs(pixels - reference[mode]).mean())
        yield row
        assert row.get("mean_pixel_difference", 0) < 3, f"{mode} on {lanes} is another image than on the processor"


def _generate(pipeline: Pipeline, mode: str, options: Options, settings: Settings) -> Result:
    return pipeline.generate(
        PROMPT, mode=mode, k=options.k, drafts=options.drafts, seed=0, num_inference_steps=settings.steps
    )


def _images_on_cpu(settings: Settings) -> dict[str, Any]:
    """The same images by ONNX Runtime in float32; nothing where it is not installed or the model is not exported."""
    if importlib.util.find_spec("onnxruntime") is None:
        return {}
    from engines.devices import parse_devices
    from engines.load import build_missing
    from engines.store import BUILD, Bundle
    from runtime.pipeline import Pipeline

    try:
        build_missing(Bundle.open("shapes", BUILD), parse_devices("cpu"))
    except EngineError:
        return {}
    pipeline = Pipeline.load("shapes", "cpu")
    found = {}
    for mode, options in FASTEST:
        found[mode] = np.asarray(_generate(pipeline, mode, options, settings).images[0], np.float32)
    pipeline.close()
    return found
