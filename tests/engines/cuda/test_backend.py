"""The CUDA backend on an imaginary machine: equal to the CPU backend in every order that the driver may choose."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from engines.base import Array
from engines.cuda.backend import CudaBackend
from engines.cuda.driver import Driver
from engines.cuda.memory import Tensor, narrow
from engines.cuda.rounds import Enqueue
from engines.errors import DeviceError, NonFiniteError
from engines.host import FunctionLane, HostBackend
from runtime.sampling.execute import denoise
from runtime.sampling.operations import STATE, Options
from runtime.sampling.place import Play, place
from runtime.sampling.program import GuidedCombine, Round, program
from runtime.sampling.schedule import Schedule
from runtime.sampling.schedulers import schedule_from_config
from tests.libcuda.lanes import FunctionNetwork, checked, extent, floats, view
from tests.libcuda.machine import KERNELS, Machine
from tests.transcription import stable_diffusion_alphas_cumprod

CONFIG = {"_class_name": "DDIMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
          "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, "num_train_timesteps": 1000}  # fmt: skip


pytestmark = pytest.mark.imaginary_gpus


@np.errstate(invalid="ignore")
def model(sample: Array, timestep: Array, conditioning: Mapping[str, Array]) -> Array:
    """Not linear, different for every step and branch, and of every row by itself."""
    shift = conditioning["encoder_hidden_states"].mean(axis=(1, 2)).reshape(-1, 1, 1, 1)
    phase = (timestep / 300).reshape(-1, 1, 1, 1).astype(np.float32)
    return np.asarray(np.sin(sample * 1.3 + phase) + shift * np.cos(sample), np.float32)


def run(
    backend: Any,
    mode: str,
    options: Options,
    schedule: Schedule,
    guidance: float = 3.0,
    shape: Sequence[int] = (1, 2, 3, 3),
    play: Play | None = None,
) -> Array:
    rng = np.random.default_rng(5)
    noise = rng.standard_normal(shape, np.float32)
    conditioning = [{"encoder_hidden_states": rng.standard_normal((shape[0], 3, 2), np.float32)} for _ in range(2)]
    state = noise * np.float32(schedule.init_noise_sigma)
    return denoise(
        backend, state, conditioning, schedule, mode, options, guidance, 7, lambda step: None, play=play
    )[0]  # fmt: skip


def schedule(steps: int, name: str = "ddim") -> Schedule:
    return schedule_from_config(CONFIG, stable_diffusion_alphas_cumprod().tolist(), steps, scheduler=name)


def reference(mode: str, options: Options, schedule: Schedule, **more: Any) -> Array:
    backend = HostBackend([FunctionLane(model)])
    try:
        return run(backend, mode, options, schedule, **more)
    finally:
        backend.close()


def open_cuda(
    devices: Sequence[int], seed: int, dtype: str = "float32", eager: int | None = None, peers: bool = True, **more: Any
) -> tuple[Machine, CudaBackend]:
    machine = Machine(max(devices) + 1, seed=seed, eager=seed % 4 if eager is None else eager, peers=peers)
    networks = [FunctionNetwork(machine, device, model) for device in devices]
    return machine, CudaBackend(Driver(), networks, dtype, KERNELS, **more)


def left(machine: Machine) -> None:
    """Nothing is, but for what the engine keeps for as long as the process lives."""
    kinds = {"context", "context reference"}
    assert set(machine.live()) <= kinds, f"close leaves behind {machine.live()}"


def distance(a: Array, b: Array) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


CASES: list[tuple[str, Options, int, str]] = [
    ("sequential", Options(k=1), 5, "ddim"),
    ("conservative", Options(k=3), 7, "ddim"),
    ("aggressive", Options(k=2), 6, "ddim"),
    ("aggressive", Options(k=4, drafts="corrected"), 9, "ddpm"),
    ("srds", Options(k=2), 9, "euler"),
    ("adaptive", Options(k=3, tolerance=0.05, drafts="corrected"), 8, "ddim"),
    ("conservative", Options(k=4), 6, "dpm++2m"),
    ("speculative", Options(k=4, drafts="corrected"), 9, "ddpm"),
]
PLACES: list[tuple[int, ...]] = [(0,), (0, 0), (0, 1), (0, 1, 2), (0, 0, 1, 1), (1, 0)]


@pytest.mark.parametrize("places", PLACES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[3]}")
@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "streams"])
def test_equal_to_the_cpu(case: tuple[str, Options, int, str], places: tuple[int, ...], graphs: bool) -> None:
    mode, options, steps, name = case
    plan = schedule(steps, name)
    machine, backend = open_cuda(places, seed=1, graphs=graphs)
    for _ in range(2):  # the second image replays what the first one captured
        assert distance(run(backend, mode, options, plan), reference(mode, options, plan)) < 1e-5
    assert (machine.calls("cuGraphLaunch") > 0) == graphs
    backend.close()
    left(machine)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("part", [0, 1, *(pytest.param(part, marks=pytest.mark.soak) for part in range(2, 10))])
def test_a_thousand_orders(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engines.cuda.peers.PAIR_BYTES", (64,))
    chance = np.random.default_rng(part)
    wanted = [reference(mode, options, schedule(steps, name)) for mode, options, steps, name in CASES]
    for number in range(1000):
        which = int(chance.integers(len(CASES)))
        mode, options, steps, name = CASES[which]
        places = PLACES[int(chance.integers(len(PLACES)))]
        machine, backend = open_cuda(places, seed=1000 * part + number, graphs=bool(chance.integers(2)))
        assert distance(run(backend, mode, options, schedule(steps, name)), wanted[which]) < 1e-5, (part, number)
        machine.check()


@pytest.mark.parametrize("seed", range(40))
def test_some_orders(seed: int) -> None:
    mode, options, steps, name = CASES[seed % len(CASES)]
    _, backend = open_cuda(PLACES[seed % len(PLACES)], seed=seed, graphs=seed % 2 == 0)
    got = run(backend, mode, options, schedule(steps, name))
    assert distance(got, reference(mode, options, schedule(steps, name))) < 1e-5


def ignore(kind: str, backend: CudaBackend) -> Callable[[int, int], bool]:
    """Which waits to forget: for a round's numbers, of a lane for home, or of home for the lanes."""
    main, uploaded = int(backend._main), {int(event) for event in backend._uploaded}
    return {
        "upload": lambda stream, event: event in uploaded,
        "fork": lambda stream, event: stream != main,
        "join": lambda stream, event: stream == main and event not in uploaded,
    }[kind]


@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "streams"])
@pytest.mark.parametrize("kind", ["upload", "fork", "join"])
def test_a_removed_wait_is_caught(kind: str, graphs: bool) -> None:
    """Every kind of wait between streams is needed: without it some order gives another image, or a capture fails."""
    plan, options = schedule(7), Options(k=2)
    wanted = reference("aggressive", options, plan)
    caught = 0
    for seed in range(30):
        machine, backend = open_cuda((0, 1), seed=seed, graphs=graphs, eager=0, lane_timeout=0.1)
        machine.ignore_waits(ignore(kind, backend))
        try:
            caught += not distance(run(backend, "aggressive", options, plan), wanted) < 1e-5
        except (DeviceError, NonFiniteError):
            caught += 1
        assert machine.forgive(), "the rules were kept without it"
    assert caught


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_low_precision(dtype: str) -> None:
    plan, options = schedule(8), Options(k=3)
    _, backend = open_cuda((0, 1), seed=3, dtype=dtype)
    error = distance(run(backend, "conservative", options, plan), reference("conservative", options, plan))
    assert 0 < error < (0.01 if dtype == "float16" else 0.08)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (1, 3, 5, 7), (3, 4, 4, 4), (2, 1, 1, 31)], ids=str)
def test_shapes_and_batches(shape: tuple[int, ...]) -> None:
    plan, options = schedule(6), Options(k=3)
    _, backend = open_cuda((0, 1, 1), seed=4)
    for guidance in (1.0, 4.0):
        got = run(backend, "aggressive", options, plan, guidance=guidance, shape=shape)
        assert distance(got, reference("aggressive", options, plan, guidance=guidance, shape=shape)) < 1e-5


def test_more_drafts_than_registers_hold() -> None:
    plan, options = schedule(90), Options(k=70)
    _, backend = open_cuda((0, 0), seed=5)
    got = run(backend, "aggressive", options, plan)
    assert distance(got, reference("aggressive", options, plan)) < 1e-4


def test_in_place_beyond_one_launch() -> None:
    """Forty rotated latents: no launch may overwrite what a later one still reads."""
    _, backend = open_cuda((0,), seed=6)
    backend.bind((1, 1, 2, 3), [0.0], [{}])
    rng = np.random.default_rng(0)
    names, values = [f"s{n}" for n in range(40)], rng.standard_normal((40, 1, 1, 2, 3), np.float32)
    for name, value in zip(names, values, strict=True):
        backend.write(name, value)
    rows = rng.standard_normal((40, 40), np.float32)
    backend.combine(names, rows, names)
    wanted = np.einsum("mj,jabcd->mabcd", rows.astype(np.float64), values)
    for name, value in zip(names, wanted, strict=True):
        assert np.allclose(backend.read(name), value, atol=1e-4)


def test_a_graph_serves_other_guidance_steps_and_noise() -> None:
    """What a request may change is not part of a graph."""
    machine, backend = open_cuda((0, 1), seed=7)
    for n, (steps, guidance, name) in enumerate([(9, 3.0, "ddim")] * 2 + [(9, 7.5, "euler"), (7, 2.0, "ddim")]):
        plan, options = schedule(steps, name), Options(k=2)
        got = run(backend, "aggressive", options, plan, guidance=guidance)
        assert distance(got, reference("aggressive", options, plan, guidance=guidance)) < 1e-5
        if n == 1:
            captured = machine.calls("cuGraphInstantiate")
    assert machine.calls("cuGraphInstantiate") == captured


def test_lanes_that_cannot_be_captured_use_streams() -> None:
    machine = Machine(1)
    networks = [FunctionNetwork(machine, 0, model), FunctionNetwork(machine, 0, model, capturable=False)]
    backend = CudaBackend(Driver(), networks, "float32", KERNELS)
    plan, options = schedule(6), Options(k=2)
    assert distance(run(backend, "aggressive", options, plan), reference("aggressive", options, plan)) < 1e-5
    assert machine.calls("cuGraphLaunch") == 0


@pytest.mark.parametrize("fault", ["peer zeros", "peer refused"])
def test_peer_copies_that_lie(fault: str, caplog: pytest.LogCaptureFixture) -> None:
    machine = Machine(2, seed=8, peers=fault != "peer refused")
    machine.set("peer_zeros", fault == "peer zeros")
    networks = [FunctionNetwork(machine, 0, model), FunctionNetwork(machine, 1, model)]
    backend = CudaBackend(Driver(), networks, "float32", KERNELS)
    assert backend.measurements.staged == ((0, 1), (1, 0))
    assert "go through host memory" in caplog.text
    assert ("changed data" if fault == "peer zeros" else "are not possible") in caplog.text
    plan, options = schedule(7), Options(k=2)
    for _ in range(2):
        assert distance(run(backend, "aggressive", options, plan), reference("aggressive", options, plan)) < 1e-5


def test_staged_copies_in_many_orders() -> None:
    plan, options = schedule(7), Options(k=3)
    wanted = reference("conservative", options, plan)
    for seed in range(30):
        machine = Machine(3, seed=seed, peers=False)
        networks = [FunctionNetwork(machine, device, model) for device in (1, 0, 2)]
        backend = CudaBackend(Driver(), networks, "float32", KERNELS, graphs=seed % 2 == 0)
        assert distance(run(backend, "conservative", options, plan), wanted) < 1e-5


def test_not_finite_is_an_error_and_the_next_image_is_right() -> None:
    _, backend = open_cuda((0, 1), seed=9, dtype="float16")
    plan, options = schedule(6), Options(k=2)
    with pytest.raises(NonFiniteError, match="NaN"):
        run(backend, "aggressive", options, plan, guidance=1e6)
    assert distance(run(backend, "aggressive", options, plan), reference("aggressive", options, plan)) < 0.01


def test_a_draft_that_overflows_and_is_rejected_fails_no_image() -> None:
    """What counts is the latent that is read, not every latent that was ever combined."""
    _, backend = open_cuda((0,), seed=9, dtype="float16")
    backend.bind((1, 1, 2, 3), [0.0], [{}])
    backend.write("x", np.ones((1, 1, 2, 3), np.float32))
    backend.combine(("x",), [[1e30]], ("draft",))
    backend.combine(("x",), [[0.5]], ("x",))
    assert (backend.read("x") == 0.5).all()
    with pytest.raises(NonFiniteError):
        backend.read("draft")


def test_out_of_memory_says_what_to_do() -> None:
    machine = Machine(1)
    machine.fail("cuMemAlloc", 3, "CUDA_ERROR_OUT_OF_MEMORY")
    with pytest.raises(DeviceError, match="fewer lanes"):
        CudaBackend(Driver(), [FunctionNetwork(machine, 0, model)], "float32", KERNELS)


def test_a_failed_launch_is_an_error_and_the_next_image_is_right() -> None:
    plan, options = schedule(6), Options(k=2)
    machine, backend = open_cuda((0, 0), seed=10)
    machine.fail("cuLaunchKernel", 4)
    with pytest.raises(DeviceError, match="cuLaunchKernel failed"):
        run(backend, "aggressive", options, plan)
    assert distance(run(backend, "aggressive", options, plan), reference("aggressive", options, plan)) < 1e-5


def test_a_lost_device_is_an_error() -> None:
    plan, options = schedule(20), Options(k=2)
    machine, backend = open_cuda((0, 1), seed=11)
    machine.set("lost_after", 5, device=1)
    with pytest.raises(DeviceError, match="lost"):
        run(backend, "aggressive", options, plan)
    assert backend.dead() == [1]
    backend.close()


def test_a_hanging_device_is_an_error() -> None:
    plan, options = schedule(20), Options(k=2)
    machine, backend = open_cuda((0,), seed=12, lane_timeout=0.2)
    machine.set("hangs", 1)
    with pytest.raises(DeviceError, match=r"did not end within 0\.2 s: lane 0 \(cuda:0\) hangs"):
        run(backend, "aggressive", options, plan)


def test_an_old_driver_and_a_device_that_is_not_there() -> None:
    machine = Machine(2)
    with pytest.raises(DeviceError, match="this machine has cuda:0 … cuda:1"):
        Driver().device(2)
    machine.set("version", 12080)
    with pytest.raises(DeviceError, match=r"is for CUDA 12\.8, this program needs 13\.0"):
        Driver()


def test_host_waits_only_where_an_answer_is_needed() -> None:
    """Rounds are enqueued without a wait: the host asks only for `bind`, `read`, and a table that is full."""
    machine, backend = open_cuda((0, 1), seed=13)
    plan, options = schedule(8), Options(k=4)
    run(backend, "aggressive", options, plan)
    machine.set("eager", 1000)
    queries: list[int] = []
    predict = backend.predict

    def counted(calls: Any) -> None:
        before = machine.calls("cuEventQuery")
        predict(calls)
        queries.append(machine.calls("cuEventQuery") - before)

    backend.predict = counted  # type: ignore[method-assign]
    run(backend, "aggressive", options, plan)
    assert queries == [0] * len(queries)


# --- several images at once ------------------------------------------------------------------------------------


class ScratchNetwork(FunctionNetwork):
    """The model in two kernels with memory of the lane between them, as compiled engines have."""

    def __init__(self, machine: Machine, device: int, model: Any) -> None:
        super().__init__(machine, device, model)
        driver = Driver()
        driver("cuCtxSetCurrent", driver.device(device).context)
        self.scratch_memory = int(driver("cuMemAlloc", 256)), 256

    def bind(self, inputs: Mapping[str, Tensor], output: Tensor, stream: Any) -> Enqueue:
        def first() -> None:
            self.scratch = {name: floats(self.machine, tensor) for name, tensor in inputs.items()}

        def second() -> None:
            values = dict(self.scratch)
            result = model(values.pop("sample"), values.pop("timestep"), values)
            view(self.machine, output)[...] = narrow(result, output.dtype)

        reads = [extent(tensor) for tensor in inputs.values()]
        begin = self.machine.work(stream, first, reads, [self.scratch_memory], model=False)
        end = self.machine.work(stream, second, [self.scratch_memory], [extent(output)])

        def run() -> None:
            checked(begin())
            checked(end())

        return run


@pytest.mark.parametrize("devices", [[0, 0], [0, 1], [0, 1, 2], [0, 0, 1, 1]])
@pytest.mark.parametrize("seed", range(6))
def test_two_images_take_turns_on_the_same_lanes(devices: list[int], seed: int) -> None:
    """Each on half of the lanes, which they change in the middle, and each with its latents on another device."""
    machine = Machine(max(devices) + 1, seed=seed, eager=seed % 4)
    networks = [ScratchNetwork(machine, device, model) for device in devices]
    driver = Driver()
    first = CudaBackend(driver, networks, "float32", KERNELS)
    second = CudaBackend(driver, networks, "float32", KERNELS, home=len(devices) - 1, sibling_of=first)
    whole, options = schedule(24), Options(k=2)
    half = len(devices) // 2
    shares = [tuple(range(half)), tuple(range(half, len(devices)))]

    def steps(backend: CudaBackend, seed: int, home: int) -> Iterator[Array | None]:
        rng = np.random.default_rng(seed)
        noise = rng.standard_normal((1, 2, 3, 3), np.float32)
        conditioning = [{"encoder_hidden_states": rng.standard_normal((1, 3, 2), np.float32)} for _ in range(2)]
        backend.bind(noise.shape, whole.timesteps, conditioning)
        backend.write(STATE, noise * np.float32(whole.init_noise_sigma))
        rounds = 0
        for operation in program("aggressive", whole, options, 3.0):
            if isinstance(operation, Round):
                mine = shares[(home + (rounds >= 6)) % 2]
                backend.predict(place(operation.branches, mine, len(devices)))
                rounds += 1
                if rounds == 6:
                    backend.settle()
                yield None
            elif isinstance(operation, GuidedCombine):
                backend.combine(operation.sources, operation.rows, operation.targets)
        yield backend.read(STATE)

    both = zip(steps(first, 1, 0), steps(second, 2, 1), strict=True)
    last = list(both)[-1]
    for seed, latents in zip((1, 2), last, strict=True):
        assert latents is not None
        rng = np.random.default_rng(seed)
        noise = rng.standard_normal((1, 2, 3, 3), np.float32)
        conditioning = [{"encoder_hidden_states": rng.standard_normal((1, 3, 2), np.float32)} for _ in range(2)]
        alone = HostBackend([FunctionLane(model)])
        wanted, _ = denoise(alone, noise, conditioning, whole, "aggressive", options, 3.0, 7, lambda step: None)
        alone.close()
        assert distance(latents, wanted) < 1e-5
    copied = {kind for backend in (first, second) for kind, number in backend.measurements.copied.items() if number}
    assert copied == ({"peer"} if len(set(devices)) > 1 else set())
    second.close()
    first.close()
