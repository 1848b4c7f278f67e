"""PyTorch networks behind the lanes of one card: images against the processor's, speed against PyTorch's own graphs."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from bench.floor import enqueued
from bench.gpu.engine import FASTEST, GUIDANCE, Image, distance, make_image, samplers_to_check, schedule
from bench.gpu.parts import NotPossibleError, Row, Settings, open_driver
from bench.statistics import percentiles, ratio
from bench.torch_lane import TorchNetwork
from engines.base import Array
from engines.cuda.backend import CudaBackend
from engines.cuda.driver import Driver
from engines.host import FunctionLane, HostBackend
from runtime.sampling.operations import Options
from runtime.sampling.schedule import Schedule

if TYPE_CHECKING:
    from bench.gpu.unet import UNet

SHAPE = (1, 4, 16, 16)
BOUND = 5e-3  # of an image in float32 whose network runs on other kernels


def _opened() -> Driver:
    """The driver, where PyTorch can use the GPU, too."""
    driver = open_driver()
    if importlib.util.find_spec("torch") is None:
        raise NotPossibleError("torch is not installed")
    import torch

    if not torch.cuda.is_available():
        raise NotPossibleError(f"torch {torch.__version__} finds no GPU")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return driver


def _words(count: int, width: int) -> Array:
    return np.random.default_rng(2).standard_normal((2, count, width), np.float32)


def on_cpu(unet: UNet) -> Callable[[Array, Array, Mapping[str, Array]], Array]:
    """A network as a lane of the CPU backend."""
    import torch

    def run(sample: Array, timestep: Array, conditioning: Mapping[str, Array]) -> Array:
        inputs = (sample, timestep, conditioning["encoder_hidden_states"])
        with torch.no_grad():
            return np.asarray(unet(*(torch.from_numpy(np.array(one)) for one in inputs)).numpy())

    return run


def one_lane(settings: Settings) -> Iterator[Row]:
    """The trained network on one lane: by PyTorch's own graph, without graphs, and inside the round's graph."""
    driver = _opened()
    from bench.gpu.unet import shapes_unet

    words, plan = _words(32, 128), schedule(settings.steps)
    host = HostBackend([FunctionLane(on_cpu(shapes_unet()))])
    wanted = make_image(host, SHAPE, words, "sequential", Options(), plan)
    host.close()
    unet = shapes_unet().to("cuda:0")
    for name, captured, inside in (
        ("a graph of its own", True, False),
        ("streams", False, False),
        ("the round's graph", False, True),
    ):
        backend = CudaBackend(
            driver, [TorchNetwork(unet, 0, captured=captured, inside=inside)], "float32", settings.cache
        )
        images = [make_image(backend, SHAPE, words, "sequential", Options(), plan) for _ in range(settings.repeats + 2)]
        seconds = [image.seconds for image in images[2:]]
        off = distance(images[-1].latents, wanted.latents)
        yield {"network": name, "rounds": images[-1].rounds, "seconds": percentiles(seconds), "distance_to_cpu": off}
        backend.close()
        assert off < BOUND, f"with the network by {name} the image is {off:.3g} away from the processor's"


def samplers(settings: Settings) -> Iterator[Row]:
    """Every sampler on 1, 2, 4 lanes, with a deterministic and a stochastic scheduler."""
    driver = _opened()
    from bench.gpu.unet import shapes_unet

    words, host = _words(32, 128), HostBackend([FunctionLane(on_cpu(shapes_unet()))])
    unet = shapes_unet().to("cuda:0")
    backends = {
        lanes: CudaBackend(driver, [TorchNetwork(unet, 0) for _ in range(lanes)], "float32", settings.cache)
        for lanes in settings.lanes
    }
    for scheduler in ("ddim", "ddpm"):
        plan = schedule(settings.steps, scheduler)
        for mode, options in samplers_to_check(plan):
            wanted = make_image(host, SHAPE, words, mode, options, plan)
            for lanes, backend in backends.items():
                found = make_image(backend, SHAPE, words, mode, options, plan)
                off = distance(found.latents, wanted.latents)
                yield {
                    "scheduler": scheduler, "mode": mode, "drafts": options.drafts, "iterations": options.iterations,
                    "tolerance": options.tolerance, "lanes": lanes, "rounds": found.rounds, "distance_to_cpu": off,
                }  # fmt: skip
                same = found.rounds == wanted.rounds
                assert off < BOUND or not same, f"{mode} on {lanes} lanes is {off:.3g} away from the CPU lanes' image"
    for backend in backends.values():
        backend.close()
    host.close()


class Baseline:
    """PyTorch alone: both branches as one batch, guidance and the step of DDIM; on a GPU as one CUDA graph per step."""

    def __init__(
        self, unet: UNet, words: Array, plan: Schedule, shape: tuple[int, ...], dtype: str, device: str
    ) -> None:
        import torch

        self.torch, kind, self.device = torch, getattr(torch, dtype), device
        self.x = torch.zeros(shape, dtype=kind, device=device)
        self.words = torch.from_numpy(words).to(device, kind)
        rows = [(r.timestep, r.data / r.alpha, r.noise - r.data * r.sigma / r.alpha) for r in plan.rows]
        self.rows = torch.tensor(rows, dtype=torch.float32, device=device)
        self.at = torch.zeros(1, dtype=torch.long, device=device)
        self.plan, self.unet = plan, unet
        self.step: Callable[[], None] = self._step

    def capture(self) -> Baseline:
        """The same, with its step as a CUDA graph."""
        torch = self.torch
        stream = torch.cuda.Stream()
        with torch.no_grad(), torch.cuda.stream(stream):
            for _ in range(3):  # libraries choose their algorithms outside of a capture
                self.at.zero_()
                self._step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        self.at.zero_()
        with torch.no_grad(), torch.cuda.graph(graph, stream=stream):
            self._step()
        self.step = graph.replay
        return self

    def _step(self) -> None:
        t, a, b = self.rows.index_select(0, self.at)[0]
        u, c = self.unet(self.torch.cat([self.x, self.x]), t.expand(2), self.words).chunk(2)
        guided = u.float() + GUIDANCE * (c.float() - u.float())
        self.x.copy_(a * self.x.float() + b * guided)
        self.at += 1

    def image(self, noise: Array) -> tuple[Array, float]:
        """The latents, and the seconds from host memory to host memory."""
        start = time.perf_counter()
        with self.torch.no_grad():
            self.x.copy_(self.torch.from_numpy(noise).to(self.device))
            self.at.zero_()
            for _ in self.plan.rows:
                self.step()
            latents = self.x.float().cpu().numpy()
        return latents, time.perf_counter() - start


def speed_of_shapes(settings: Settings) -> Iterator[Row]:
    """The embedded model's network in float32 at 16 × 16 latents."""
    driver = _opened()
    from bench.gpu.unet import shapes_unet

    return _speed(driver, settings, shapes_unet().to("cuda:0"), _words(32, 128), SHAPE, "float32")


def speed_of_large(settings: Settings) -> Iterator[Row]:
    """Stable Diffusion 1.5's network with random weights in fp16 at 64 × 64 latents."""
    driver = _opened()
    import torch

    from bench.gpu.unet import large_unet

    with torch.device("cuda:0"):
        unet = large_unet()
    return _speed(driver, settings, unet.half(), _words(77, 768), (1, 4, 64, 64), "float16")


def _speed(
    driver: Driver, settings: Settings, unet: UNet, words: Array, shape: tuple[int, ...], dtype: str
) -> Iterator[Row]:
    """All samplers and both baselines in turn, so that a clock that drifts hits all alike."""
    plan = schedule(settings.steps)
    noise = np.random.default_rng(1).standard_normal(shape, np.float32) * np.float32(plan.init_noise_sigma)
    baselines = {
        "torch, eager": Baseline(unet, words, plan, shape, dtype, "cuda:0"),
        "torch, CUDA graph": Baseline(unet, words, plan, shape, dtype, "cuda:0").capture(),
    }
    one_lane: list[float] = []
    for lanes in settings.lanes:
        backend = CudaBackend(driver, [TorchNetwork(unet, 0) for _ in range(lanes)], dtype, settings.cache)
        torches: dict[str, list[float]] = {name: [] for name in baselines}
        images: dict[str, list[Image]] = {mode: [] for mode, _ in FASTEST}
        floors: dict[str, list[float]] = {mode: [] for mode, _ in FASTEST}
        alone = np.zeros(0, np.float32)
        for turn in range(settings.repeats + 2):
            for name, baseline in baselines.items():
                alone, seconds = baseline.image(noise)
                torches[name] += [seconds] if turn > 1 else []
            for mode, options in FASTEST:
                image = make_image(backend, shape, words, mode, options, plan)
                floor = enqueued(backend, image.calls)
                images[mode].append(image)
                floors[mode] += [floor] if turn > 1 else []
        sequential = images["sequential"][-1].latents
        one_lane = one_lane or [image.seconds for image in images["sequential"][2:]]
        for name, taken in torches.items():
            yield {"what": name, "beside_lanes": lanes, "steps": plan.steps, "seconds": percentiles(taken),
                   "distance_to_sequential": distance(alone, sequential)}  # fmt: skip
        for mode, options in FASTEST:
            yield _speed_row(lanes, mode, options, images[mode][2:], floors[mode], torches, one_lane, sequential)
        backend.close()
        off = distance(alone, sequential)
        assert off < (BOUND if dtype == "float32" else 0.1), f"one lane is {off:.3g} away from PyTorch's own image"


def _speed_row(
    lanes: int, mode: str, options: Options, images: Sequence[Image], floors: list[float],
    torches: Mapping[str, list[float]], one_lane: list[float], sequential: Array,
) -> Row:  # fmt: skip
    seconds, rounds = [image.seconds for image in images], images[-1].rounds
    over = float(np.median(np.subtract(seconds, floors)))
    return {
        "what": mode, "lanes": lanes, "k": options.k, "rounds": rounds, "seconds": percentiles(seconds),
        "floor_seconds": percentiles(floors), "share_of_floor": ratio(floors, seconds),
        "overhead_us_per_round": over / rounds * 1e6, "us_per_round": float(np.median(seconds)) / rounds * 1e6,
        "speedups": {name: ratio(taken, seconds) for name, taken in torches.items()}
        | {"one lane, sequential": ratio(one_lane, seconds)},
        "drift": distance(images[-1].latents, sequential),
    }  # fmt: skip
