"""The protocol over gRPC, on the event loop of the HTTP server: `grpc.aio` beside uvicorn."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from functools import partial
from typing import Any

import grpc
from PIL import Image

from engines.errors import EngineError, ParameterError
from runtime.serve.access import Access
from runtime.serve.kserve.codec import Inference, image_tensor
from runtime.serve.kserve.model import VERSION, Model, status_of
from runtime.serve.kserve.proto import inference_pb2 as pb
from runtime.serve.kserve.refused import FIXED, NO_LOGS, NO_TRACES, Refused
from runtime.serve.kserve.regions import CUDA, SYSTEM, Regions
from runtime.serve.kserve.tensor import MOST_ELEMENTS, MOST_TENSORS, SHORT, Tensor, from_raw, from_values
from runtime.serve.logs import REQUEST_ID
from runtime.serve.request import CancelledError, Request
from runtime.serve.service import Previews

log = logging.getLogger(__name__)
WIRE_NAME = "inference.GRPCInferenceService"  # the messages' own package is not on the wire
OPEN = ("ServerLive", "ServerReady")  # without a key, as health over HTTP
MOST_PREVIEWS = 10
FRAME_BYTES = 1 << 16  # of a message beside its tensors
ALIVE_SECONDS = 60  # after which a silent connection is asked whether its client is still there
REFUSED = {
    **dict.fromkeys(("RepositoryModelLoad", "RepositoryModelUnload"), FIXED),
    "TraceSetting": NO_TRACES, "LogSettings": NO_LOGS,
}  # fmt: skip
# the field of `InferTensorContents` that holds the elements of a type
CONTENTS = {
    "BOOL": "bool_contents", "BYTES": "bytes_contents", "FP32": "fp32_contents", "FP64": "fp64_contents",
    "INT64": "int64_contents", "UINT64": "uint64_contents",
    **dict.fromkeys(("INT8", "INT16", "INT32"), "int_contents"),
    **dict.fromkeys(("UINT8", "UINT16", "UINT32"), "uint_contents"),
}  # fmt: skip
Context = Any  # grpc.aio.ServicerContext; grpcio has no types


def parse(message: Any, regions: Regions) -> Inference:
    """A request; ParameterError names what cannot be used. Inputs in shared memory have no raw content."""
    inputs: dict[str, Tensor] = {}
    raw, used = message.raw_input_contents, 0
    for name in ("inputs", "outputs", "parameters"):
        if len(getattr(message, name)) > MOST_TENSORS:
            raise ParameterError(name, f"a request has up to {MOST_TENSORS} {name}, not {len(getattr(message, name))}")
    for one in message.inputs:
        name, shape = one.name, list(one.shape)
        if name in inputs:
            raise ParameterError(name, f"the input {name} comes twice")
        if (shared := regions.read(name, parameters_of(one))) is not None:
            inputs[name] = from_raw(name, one.datatype, shape, shared)
        elif raw:
            if one.HasField("contents") or used == len(raw):
                raise ParameterError(name, f"{name} must come in raw_input_contents, as the others do, and only there")
            inputs[name] = from_raw(name, one.datatype, shape, raw[used])
            used += 1
        elif (place := CONTENTS.get(one.datatype)) is not None:
            contents = getattr(one.contents, place)
            if len(contents) > MOST_ELEMENTS:
                message_text = f"{name} has {len(contents)} elements: send more than {MOST_ELEMENTS} as raw contents"
                raise ParameterError(name, message_text)
            inputs[name] = from_values(name, one.datatype, shape, list(contents))
        else:
            raise ParameterError(name, f"{name} of {one.datatype!r} must come in raw_input_contents")
    if used != len(raw):
        raise ParameterError("raw_input_contents", f"there are {len(raw)} raw contents for {used} inputs")
    outputs: dict[str, dict[str, Any]] = {}
    for one in message.outputs:
        if one.name in outputs:
            raise ParameterError(one.name, f"the output {one.name} comes twice")
        outputs[one.name] = parameters_of(one)
    return Inference(inputs, outputs, parameters_of(message), message.id)


def parameters_of(message: Any) -> dict[str, Any]:
    """The parameters of a request or a tensor in Python's types."""
    if len(message.parameters) > MOST_TENSORS:
        raise ParameterError("parameters", f"there are up to {MOST_TENSORS} parameters, not {len(message.parameters)}")
    found = {}
    for name, value in message.parameters.items():
        chosen = value.WhichOneof("parameter_choice")
        if chosen is not None:
            found[name] = getattr(value, chosen)
    return found


def response(model: Model, inference: Inference, outputs: list[Tensor], facts: Mapping[str, Any]) -> Any:
    """An answer with raw contents, empty for what lies in shared memory; `facts` are its parameters."""
    made, size = pb.ModelInferResponse(model_name=model.name, model_version=VERSION, id=inference.id), 0
    for tensor in outputs:
        entry = made.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        shared = model.in_region(inference, tensor)
        set_parameters(entry, shared or {})
        made.raw_output_contents.append(b"" if shared is not None else bytes(tensor.raw()))
        size += len(made.raw_output_contents[-1])
    model.check_answer(size)
    set_parameters(made, facts)
    return made


def set_parameters(message: Any, values: Mapping[str, Any]) -> None:
    """Parameters of a message, by their types."""
    for name, value in values.items():
        kind = {bool: "bool_param", int: "int64_param", str: "string_param"}[type(value)]
        setattr(message.parameters[name], kind, value)


class Servicer:
    """The methods, by the names that they have on the wire."""

    def __init__(self, model: Model, access: Access) -> None:
        self._model, self._access = model, access
        self._count = model.service.metrics.requests

    def handler(self) -> grpc.GenericRpcHandler:
        """All methods, under the protocol's name of the service."""
        methods = {
            name: grpc.unary_unary_rpc_method_handler(self._guarded(name, self._refuse(reason)))  # of any bytes
            for name, reason in REFUSED.items()
        }
        for method in pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods:
            kind, answer = getattr(pb, method.input_type.name), getattr(pb, method.output_type.name)
            types = {"request_deserializer": kind.FromString, "response_serializer": answer.SerializeToString}
            if method.name == "ModelStreamInfer":
                methods[method.name] = grpc.stream_stream_rpc_method_handler(self._stream, **types)
            else:
                unary = self._guarded(method.name, getattr(self, method.name))
                methods[method.name] = grpc.unary_unary_rpc_method_handler(unary, **types)
        return grpc.method_handlers_generic_handler(WIRE_NAME, methods)

    def _guarded(self, name: str, unary: Callable[[Any, Context], Awaitable[Any]]) -> Callable[[Any, Context], Any]:
        async def guard(message: Any, context: Context) -> Any:
            if name not in OPEN:
                await self._check_key(context)
            try:
                return await unary(message, context)
            except Exception as error:  # noqa: BLE001 - what nobody expects is logged, and answered without its text
                _, code, text = told(error)
            return await context.abort(getattr(grpc.StatusCode, code), text)

        return guard

    async def _check_key(self, context: Context) -> None:
        given = dict(context.invocation_metadata() or ()).get("authorization", "")
        if not isinstance(given, str) or not self._access.has_key(given):
            message = "send one of this server's keys as metadata: authorization: Bearer KEY"
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, message)

    def _refuse(self, reason: str) -> Callable[[Any, Context], Awaitable[Any]]:
        async def refuse(message: Any, context: Context) -> Any:
            raise Refused(reason)

        return refuse

    async def ServerLive(self, message: Any, context: Context) -> Any:  # noqa: N802, D102
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, message: Any, context: Context) -> Any:  # noqa: N802, D102
        return pb.ServerReadyResponse(ready=await self._model.service.health.trouble() is None)

    async def ModelReady(self, message: Any, context: Context) -> Any:  # noqa: N802, D102
        self._model.check(message.name, message.version)
        return pb.ModelReadyResponse(ready=await self._model.service.health.trouble() is None)

    async def ServerMetadata(self, message: Any, context: Context) -> Any:  # noqa: N802, D102
        return pb.ServerMetadataResponse(name="driffusion", version=VERSION, extensions=self._model.extensions)

    async def ModelMetadata(self, message: Any, context: Context) -> Any:  # noqa: N802, D102
        self._model.check(message.name, message.version)
        return pb.ModelMetadataResponse(**self._model.metadata)

    async def ModelConfig(self, message: Any, context: Context) -> Any:  # noqa: N802, D102
        self._model.check(message.name, message.version)
        return pb.ModelConfigResponse(config=pb.ModelConfig(**self._model.config))

    async def ModelStatistics(self, message: Any, context: Context) -> Any:  # noqa: N802, D102
        if message.name:
            self._model.check(message.name, message.version)
        return pb.ModelStatisticsResponse(model_stats=[pb.ModelStatistics(**self._model.statistics())])

    async def RepositoryIndex(self, message: Any, context: Context) -> Any:  # noqa: N802, D102
        made = pb.RepositoryIndexResponse()
        made.models.add(name=self._model.name, version=VERSION, state="READY")
        return made

    async def SystemSharedMemoryStatus(self, message: Any, context: Context) -> Any:  # noqa: N802, D102
        return regions_of(pb.SystemSharedMemoryStatusResponse, self._model.regions.status(SYSTEM, message.name))

    async def SystemSharedMemoryRegister(self, message: Any, context: Context) -> Any:  # noqa: N802, D102
        self._model.regions.register_system(message.name, message.key, message.offset, message.byte_size)
        return pb.SystemSharedMemoryRegisterResponse()

    async def SystemSharedMemoryUnregister(self, message: Any, context: Context) -> Any:  # noqa: N802, D102
        self._model.regions.unregister(SYSTEM, message.name)
        return pb.SystemSharedMemoryUnregisterResponse()

    async def CudaSharedMemoryStatus(self, message: Any, context: Context) -> Any:  # noqa: N802, D102
        return regions_of(pb.CudaSharedMemoryStatusResponse, self._model.regions.status(CUDA, message.name))

    async def CudaSharedMemoryRegister(self, message: Any, context: Context) -> Any:  # noqa: N802, D102
        given = message.name, message.raw_handle, message.device_id, message.byte_size
        await asyncio.to_thread(self._model.regions.register_cuda, *given)
        return pb.CudaSharedMemoryRegisterResponse()

    async def CudaSharedMemoryUnregister(self, message: Any, context: Context) -> Any:  # noqa: N802, D102
        await asyncio.to_thread(self._model.regions.unregister, CUDA, message.name)
        return pb.CudaSharedMemoryUnregisterResponse()

    async def ModelInfer(self, message: Any, context: Context) -> Any:  # noqa: N802, D102
        answers = [one async for one in self._infer(message, context, streamed=False)]
        return answers[-1]

    async def _infer(self, message: Any, context: Context, *, streamed: bool) -> AsyncGenerator[Any, None]:
        """The previews of a request where its parameter `previews` asks for them, then its answer.

        The end of the call, by the client or by its deadline, cancels the request at the next round.
        """
        start, request_id = time.monotonic(), uuid.uuid4().hex
        loop, queue = asyncio.get_running_loop(), asyncio.Queue[Any]()
        send = lambda one: loop.call_soon_threadsafe(queue.put_nowait, one)  # noqa: E731
        outcome, request = 499, None
        try:
            self._model.check(message.model_name, message.model_version)
            parsing = partial(parse, message, self._model.regions)
            here = self._model.regions.quick and message.ByteSize() <= SHORT
            inference = parsing() if here else await asyncio.to_thread(parsing)

            def preview(index: int, image: Image.Image) -> None:
                facts = {"preview": index, "triton_final_response": False}
                inline = Inference({}, id=inference.id)  # previews stay out of the parts for outputs
                send(response(self._model, inline, [image_tensor([image], None)], facts))

            def place(outputs: list[Tensor]) -> None:
                facts = {"triton_final_response": True} if streamed else {}
                send(response(self._model, inference, outputs, facts))

            limits = [self._model.seconds(inference.parameters), context.time_remaining()]
            call, previews = await self._model.call(inference), previews_of(inference, streamed=streamed)
            request = self._model.submit(
                inference, call, Previews(previews, preview), request_id=request_id,
                seconds=min((one for one in limits if one is not None), default=None), place=place,
            )  # fmt: skip
            request.future.add_done_callback(lambda _: send(None))
            while (answer := await next_of(queue, request)) is not None:
                yield answer
            await asyncio.wrap_future(request.future)
            outcome = 200
        except Exception as error:
            outcome = (status_of(error) or (500, ""))[0]
            raise
        finally:
            if request is not None:
                request.cancel()
            self._count.labels(str(outcome)).inc()
            REQUEST_ID.set(request_id)
            method = "ModelStreamInfer" if streamed else "ModelInfer"
            log.info("method=%s status=%d seconds=%.3f", method, outcome, time.monotonic() - start)

    async def _stream(self, messages: AsyncIterator[Any], context: Context) -> AsyncIterator[Any]:
        """Requests one after the other; an error of one is its answer, and the stream goes on."""
        await self._check_key(context)
        async for message in messages:
            try:
                async with contextlib.aclosing(self._infer(message, context, streamed=True)) as answers:
                    async for one in answers:
                        yield pb.ModelStreamInferResponse(infer_response=one)
            except Exception as error:  # noqa: BLE001 - as `_guarded`
                _, _, text = told(error)
                failed = pb.ModelInferResponse(id=message.id, model_name=message.model_name)
                yield pb.ModelStreamInferResponse(error_message=text, infer_response=failed)


def regions_of(kind: Any, status: list[dict[str, Any]]) -> Any:
    """Regions by their names."""
    return kind(regions={one["name"]: kind.RegionStatus(**one) for one in status})


def told(error: Exception) -> tuple[int, str, str]:
    """The HTTP and gRPC status of an error, and its text; what is no fault of the client is logged."""
    status = status_of(error)
    if status is None:
        log.error("request failed: %r", error, exc_info=error)
        return 500, "INTERNAL", "unexpected error, see the server's log"
    if status[0] >= 500:
        log.error("request failed: %r", error)
    return *status, str(error)


def previews_of(inference: Inference, *, streamed: bool) -> int:
    """How many previews are asked for; ParameterError outside of streams, which alone can send them."""
    count = inference.parameters.get("previews", 0)
    if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= MOST_PREVIEWS:
        raise ParameterError("previews", f"previews must be a whole number from 0 to {MOST_PREVIEWS}, not {count!r}")
    if count and not streamed:
        raise ParameterError("previews", "only ModelStreamInfer sends previews: leave the parameter out")
    return count


async def next_of(queue: asyncio.Queue[Any], request: Request) -> Any:
    """The next answer, None after the last; DeadlineError when none comes in time."""
    try:
        async with asyncio.timeout(max(request.seconds_left, 0)):
            return await queue.get()
    except TimeoutError:
        error = request.deadline_error()
        request.cancel(error)
        raise error from None
    except asyncio.CancelledError:
        request.cancel(CancelledError("the client cancelled"))
        raise


def make_server(model: Model, access: Access, address: str) -> tuple[Any, int]:
    """A server of the running event loop, to be started, and its port; EngineError where it cannot listen."""
    options = [
        ("grpc.max_send_message_length", model.service.limits.answer + FRAME_BYTES), ("grpc.so_reuseport", 0),
        ("grpc.max_receive_message_length", model.service.limits.upload),
        ("grpc.keepalive_time_ms", ALIVE_SECONDS * 1000), ("grpc.keepalive_timeout_ms", ALIVE_SECONDS * 1000 // 3),
    ]  # fmt: skip
    server = grpc.aio.server(options=options, maximum_concurrent_rpcs=model.service.limits.connections)
    server.add_generic_rpc_handlers([Servicer(model, access).handler()])
    try:
        port = server.add_insecure_port(address)
    except RuntimeError as error:
        raise EngineError(f"cannot listen on {address}: choose another with --grpc-port") from error
    return server, port
