"""ONNX Runtime on CPU cores: compiled plans, and lanes with one thread on one session or with sessions of their own."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnxruntime

from engines.base import Array, Progress
from engines.batches import CachedLane, Run
from engines.cached import feature_shape
from engines.devices import LaneSpec, cores, machine
from engines.errors import BundleError, DeviceError
from engines.host import CLOSED, HostBackend
from engines.manifest import DEEP, DENOISER, SHALLOW
from engines.memory import give_back, have_room
from engines.process import Owner
from engines.store import Bundle, Plan, locked, plan_key


def plan_fields(bundle: Bundle, network: str) -> dict[str, str]:
    """Everything that the compiled form of a network depends on."""
    return {
        "network": network,
        "onnx_sha256": bundle.manifest.networks[network].sha256,
        "precision": bundle.manifest.precision,
        "runtime": f"onnxruntime {onnxruntime.__version__}",
        "provider": "CPUExecutionProvider",
        "optimization": "all",
        "machine": machine(),
    }


def _options(threads: int) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # it warns that a plan is for this machine only, which is what plans are
    return options


def build_plan(bundle: Bundle, network: str) -> Plan:
    """Optimizes one network for this processor and stores the result."""
    start = time.perf_counter()
    source = bundle.onnx(network)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=bundle.folder.parent) as scratch:
        target = Path(scratch) / f"{network}.onnx"
        options = _options(cores())
        options.optimized_model_filepath = str(target)
        data = target.with_suffix(".data")
        if bundle.manifest.networks[network].data is not None:  # more than one file of the format may hold
            options.add_session_config_entry("session.optimized_model_external_initializers_file_name", data.name)
            options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
        try:
            onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the library raises many types of its own
            raise BundleError(
                f"{source} cannot be compiled ({error}): see that the disk is not full, or {bundle.repair}"
            ) from error
        files = [path for path in (target, data) if path.is_file()]
        return bundle.add_plan(network, plan_fields(bundle, network), files, time.perf_counter() - start)


def trouble() -> str | None:
    """See load.RuntimeModule: there always is a processor."""
    return None


def wanted(bundle: Bundle, runtime: str) -> dict[str, list[dict[str, str]]]:
    """See load.RuntimeModule."""
    return {network: [plan_fields(bundle, network)] for network in bundle.manifest.networks}


def build_missing(
    bundle: Bundle, lanes: Sequence[LaneSpec] = (), progress: Progress | None = None
) -> dict[str, Plan | None]:
    """See load.RuntimeModule. A plan serves any number of lanes."""
    networks = bundle.manifest.networks
    found: dict[str, Plan | None] = {}
    with locked(bundle.folder):
        for done, network in enumerate(networks):
            if progress is not None:
                progress("compile", done, len(networks))
            there = bundle.has_intact_plan(plan_fields(bundle, network))
            found[network] = None if there else build_plan(bundle, network)
    return found


class Session:
    """One network ready to run."""

    def __init__(self, bundle: Bundle, network: str, threads: int, *, spin: bool = False) -> None:
        plan = bundle.plan(network, plan_fields(bundle, network))
        content = bundle.plan_content(plan)
        options = _options(threads)
        if plan.data is not None:
            folder = str(bundle.plan_folder(plan.key))
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # the plan has it all
        options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spin else "0")
        self.network = network
        self.spec = bundle.manifest.networks[network]
        self._session: onnxruntime.InferenceSession | None
        have_room(len(content), network)
        try:
            self._session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the library raises many types of its own
            if any(words in str(error) for words in ("bad_alloc", "Cannot allocate memory")):
                raise MemoryError(f"{network} cannot be loaded") from error
            raise DeviceError(f"{network} cannot be loaded by ONNX Runtime: {error}") from error
        self._owner = Owner()

    @property
    def session(self) -> onnxruntime.InferenceSession:
        """ONNX Runtime's session; DeviceError when it is closed, or of the process that this one was forked from."""
        self._owner.check()
        if self._session is None:
            raise DeviceError(CLOSED)
        return self._session

    def close(self) -> None:
        """Frees the network's memory and threads now, rather than when the garbage collector comes by."""
        self._session = None

    def run(self, **inputs: np.ndarray) -> dict[str, Array]:
        """See load.Runner."""
        session = self.session
        try:
            found = session.run(None, inputs)
        except Exception as error:  # the library raises many types of its own
            raise DeviceError(f"{self.network} failed in ONNX Runtime: {error}") from error
        return {output.name: value for output, value in zip(self.spec.outputs, found, strict=True)}


class SessionLane:
    """A lane on one session."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def bind(self, inputs: Mapping[str, Array], output: Array) -> Run:
        """See host.Lane. The session reads and writes the arrays themselves."""
        binding = self._session.session.io_binding()
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(value))
        name = self._session.spec.outputs[0].name
        binding.bind_ortvalue_output(name, onnxruntime.OrtValue.ortvalue_from_numpy(output))

        def run() -> None:
            session = self._session.session
            try:
                session.run_with_iobinding(binding)
            except Exception as error:  # the library raises many types of its own
                raise DeviceError(f"{self._session.network} failed in ONNX Runtime: {error}") from error

        return run


class Engines:
    """A loaded model: what runs once per image on all cores, and the lanes of the denoiser."""

    def __init__(self, bundle: Bundle, lanes: Sequence[LaneSpec], *, lane_timeout: float = 0.0) -> None:
        threads = max(cores() if len(lanes) > 1 else lanes[0].threads, 1)
        manifest = bundle.manifest
        self.runners = {network: Session(bundle, network, threads) for network in manifest.once}
        self._sessions: list[Session] = []
        self.plan_folder = bundle.plan_folder(plan_key(plan_fields(bundle, DENOISER)))
        whole, cached = self._lanes(bundle, DENOISER, lanes), list[CachedLane]()
        if manifest.caches:
            parts = zip(*(self._lanes(bundle, name, lanes) for name in (DEEP, SHALLOW)), strict=True)
            cached = [CachedLane(deep, shallow, feature_shape(manifest)) for deep, shallow in parts]
        self.backend = HostBackend(whole, cached=cached)
        self._siblings: list[HostBackend] = []

    def _lanes(self, bundle: Bundle, network: str, lanes: Sequence[LaneSpec]) -> list[SessionLane]:
        """A network on every lane; weights are loaded once where a call runs on the thread that it comes from.

        A session's own threads serve one call at a time, so that lanes of several threads have sessions of their own.
        """
        count = len(lanes) if lanes[0].threads > 1 else 1
        spin = len(lanes) == 1
        made = [Session(bundle, network, lane.threads, spin=spin) for lane in lanes[:count]]
        self._sessions += made
        return [SessionLane(session) for session in (made if count == len(lanes) else made * len(lanes))]

    def sibling(self, home: int) -> HostBackend:
        """See load.Engines."""
        self._siblings.append(self.backend.sibling())
        return self._siblings[-1]

    def close(self) -> None:
        """Stops the lanes and frees their memory."""
        for backend in (*self._siblings, self.backend):
            backend.close()
        for session in (*self.runners.values(), *self._sessions):
            session.close()
        give_back()
