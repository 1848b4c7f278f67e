"""`Machine`: a model's networks and lanes on this computer, and what is done when a lane stops working.

It knows no prompts: `Pipeline` turns a call into arrays and gives it work to run, on lanes (`on_lanes`) or beside them
(`beside_lanes`). Work whose device is lost is run again on what is left.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np

from engines.base import Array, Backend, Branch
from engines.cuda.driver import LANE_TIMEOUT
from engines.devices import LaneSpec
from engines.errors import DeviceError, EngineError, NonFiniteError
from engines.load import Runner, load
from engines.manifest import DENOISER, Manifest
from engines.store import Bundle
from runtime.lane_policy import ANY_SIZES, BatchSizes, Seconds
from runtime.lanes import Lanes, Lease
from runtime.sampling.noise import gaussian
from runtime.sampling.operations import STATE

log = logging.getLogger(__name__)
Made = TypeVar("Made")


class Machine:
    """A model on a set of lanes. Safe to use from several threads, which share the lanes (`runtime.lanes`).

    A lane that stops working is left out from then on and named in `lost`; `revive` tries it again. `devices` are the
    lanes that there are.
    """

    def __init__(self, bundle: Bundle, devices: tuple[LaneSpec, ...], lane_timeout: float = LANE_TIMEOUT) -> None:
        self.bundle, self._lane_timeout = bundle, lane_timeout
        self._wanted = self.devices = devices
        self.lost: tuple[str, ...] = ()
        self.closed = False
        self._repairing = threading.Lock()
        self._open()
        self.lanes = Lanes(len(devices), self._backend_of)

    def _open(self) -> None:
        """Loads the networks on the lanes that there are."""
        self.engines = load(self.bundle, self.devices, self._lane_timeout)
        self.prober: Backend | None = None

    def _backend_of(self, lane: int) -> Backend:
        return self.engines.sibling(lane % len(self.devices)) if lane else self.engines.backend

    @property
    def runners(self) -> Mapping[str, Runner]:
        """The networks that run once per image, by name: they belong to no lane."""
        return self.engines.runners

    @property
    def plan_folder(self) -> Path:
        """Where what was measured on these lanes is kept: beside the compiled denoiser."""
        return self.engines.plan_folder

    def close(self) -> None:
        """Stops the lanes, after what runs on them."""
        with self.lanes.alone(wait=True):
            if not self.closed:
                self.engines.close()
            self.closed = True

    def on_lanes(
        self, work: Callable[[Lease], Made], seconds: Seconds, before_round: Callable[[], None], most: int,
        warnings: list[str], rows: float = 1.0, sizes: BatchSizes = ANY_SIZES, priority: int = 5,
    ) -> Made:  # fmt: skip
        """Runs work on at most so many lanes, when it is its turn; again, and first in the queue, if a lane is lost.

        `seconds`, `before_round`, `rows`, `sizes` and `priority` are those of `Lanes.lease`. A loss is added to the
        warnings.
        """
        again = False
        while True:
            try:
                with self.lanes.lease(
                    seconds, before_round, first=again, most=most, rows=rows, sizes=sizes, priority=priority
                ) as lease:
                    return work(lease)
            except DeviceError as error:
                again = True
                warnings.append(self._without_dead_lanes(error, lease.backend, lease.generation))

    def beside_lanes(self, run: Callable[[], Made], warnings: list[str]) -> Made:
        """Runs networks that belong to no lane; once more on what is left if their device is lost."""
        generation = self.lanes.generation
        try:
            with self.lanes.visit():
                return run()
        except DeviceError as error:
            warnings.append(self._without_dead_lanes(error, self.engines.backend, generation))
        with self.lanes.visit():
            return run()

    def probe(self) -> bool:
        """One evaluation of noise on every lane, to see whether they work; False, at once, while images use them.

        DeviceError or NonFiniteError of a lane that does not; a lane that stopped working is left out from then on.
        """
        with self.lanes.alone(wait=False) as free:
            if not free:
                return False
            generation, error = self.lanes.generation, None
            backend = self.prober = self.prober or self.engines.sibling(0)
            try:
                self._evaluate(backend)
            except DeviceError as caught:
                error = caught
        if error is not None:
            self._without_dead_lanes(error, backend, generation)
            raise error
        return True

    def _evaluate(self, backend: Backend) -> None:
        """The same evaluation on every lane at once."""
        sample, conditioning = probe_inputs(self.bundle.manifest)
        backend.bind(sample.shape, [1.0], [conditioning])
        backend.write(STATE, sample)
        outputs = [f"output {lane}" for lane in range(backend.lanes)]
        calls = [(Branch(STATE, 0, output, 0),) for output in outputs]
        backend.predict(calls)
        self.lanes.count_busy(backend, calls)
        if not all(np.isfinite(backend.read(output)).all() for output in outputs):
            raise NonFiniteError("a lane answered with NaN or infinity")
        backend.settle()

    def revive(self) -> bool:
        """Opens the model again on the lost lanes, too, after the images that are being made; whether all lanes work.

        EngineError when not even those that worked can be opened.
        """
        with self._repairing, self.lanes.alone(wait=True):
            if not self.lost:
                return True
            left = self.devices
            self.engines.close()
            try:
                self.devices = self._wanted
                self._open()
                self.lost = ()
            except EngineError as error:
                log.warning("%s did not come back: %s", ", ".join(self.lost), error)
                self.devices = left
                self._open()
            self.lanes.replace(len(self.devices), self._backend_of)
        try:
            self.probe()
        except EngineError as error:
            log.warning("lanes that came back do not work: %s", error)
        return not self.lost

    def _without_dead_lanes(self, error: DeviceError, used: Backend, generation: int) -> str:
        """Goes on with the lanes that still work and says so; raises the error when it was no lane, or the last one.

        Images that other threads are making on the others are waited for; those that fail, too, come here next.
        """
        with self._repairing:
            if generation != self.lanes.generation:
                return f"lanes stopped working ({error}): the image was made again on the others"
            dead = used.dead()
            left = tuple(lane for number, lane in enumerate(self.devices) if number not in dead)
            if not dead or not left:
                raise error
            names = [str(self.devices[number]) for number in dead]
            message = f"{', '.join(names)} stopped working ({error}): the image was made again on the other lanes"
            log.error("%s", message)
            with self.lanes.alone(wait=True):
                self.engines.close()
                self.devices, self.lost = left, (*self.lost, *names)
                self._open()
                self.lanes.replace(len(left), self._backend_of)
            return message


def probe_inputs(manifest: Manifest) -> tuple[Array, dict[str, Array]]:
    """A latent and the denoiser's other inputs for one image of the default size: noise that is always the same."""
    axes = manifest.latent_axes(manifest.sizes.width, manifest.sizes.height, 1)
    specs = [spec for spec in manifest.networks[DENOISER].inputs if spec.name != "timestep"]
    found = {spec.name: gaussian(0, 0, number, spec.resolve(axes)) for number, spec in enumerate(specs)}
    return found.pop("sample"), found
