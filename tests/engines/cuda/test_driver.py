"""The driver's errors, its one lock, and contexts that are let go or reset."""

from __future__ import annotations

import gc
import os
import threading
import time

import pytest

from engines.cuda.backend import CudaBackend
from engines.cuda.driver import Driver
from engines.errors import DeviceError
from runtime.sampling.operations import Options
from tests.engines.cuda.test_backend import distance, model, reference, run, schedule
from tests.libcuda.lanes import FunctionNetwork
from tests.libcuda.machine import KERNELS, Machine

pytestmark = pytest.mark.imaginary_gpus


def test_a_status_that_nobody_knows_is_a_device_error() -> None:
    machine = Machine(1)
    driver = Driver()
    driver("cuCtxSetCurrent", driver.device(0).context)
    machine.fail("cuMemAlloc", 1, 12345)
    with pytest.raises(DeviceError, match="cuMemAlloc failed with a status that cuda-python does not know"):
        driver("cuMemAlloc", 256)


def test_an_unknown_status_in_the_middle_of_an_image() -> None:
    """Also where calls go past `Driver.__call__`."""
    plan, options = schedule(9), Options(k=2)
    for name in ("cuMemcpyHtoDAsync", "cuGraphLaunch", "cuStreamWaitEvent", "cuEventQuery"):
        machine = Machine(2, seed=1)
        backend = CudaBackend(
            Driver(), [FunctionNetwork(machine, n, model) for n in (0, 1)], "float32", KERNELS
        )  # fmt: skip
        run(backend, "aggressive", options, plan)
        machine.fail(name, 3, 12345)
        with pytest.raises(DeviceError):
            run(backend, "aggressive", options, plan)
        assert distance(run(backend, "aggressive", options, plan), reference("aggressive", options, plan)) < 1e-5


def test_more_streams_than_eight_do_not_share_queues() -> None:
    Machine(1)
    Driver()
    assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "32"


def test_a_gpu_comes_back_after_an_error_that_sticks() -> None:
    """Its context is reset when the driver lets go of it; the other one's is only released."""
    plan, options = schedule(7), Options(k=2)
    machine = Machine(2, seed=4)
    for attempt in range(3):
        driver = Driver()
        networks = [FunctionNetwork(machine, n, model) for n in (0, 1)]
        backend = CudaBackend(driver, networks, "float32", KERNELS)
        if attempt == 1:
            machine.fail("cuLaunchKernel", 9, "CUDA_ERROR_ILLEGAL_ADDRESS", sticky=True)
            with pytest.raises(DeviceError, match="the device was lost"):
                run(backend, "aggressive", options, plan)
            assert len(backend.dead()) == 1
        else:
            assert distance(run(backend, "aggressive", options, plan), reference("aggressive", options, plan)) < 1e-5
        backend.close()
        driver.close()
        assert "context reference" not in machine.live(), "a context is still held"
    assert machine.calls("cuDevicePrimaryCtxReset") == 1


def test_what_ends_a_capture_waits_for_it() -> None:
    """Another thread's allocation comes after the capture, and garbage is collected again after two at once."""
    machine = Machine(1)
    driver = Driver()
    device = driver.device(0)
    driver("cuCtxSetCurrent", device.context)
    stream, order, inside = driver.stream(), list[str](), threading.Event()
    target = int(driver("cuMemAlloc", 256))

    def enqueue() -> None:
        driver("cuMemsetD8Async", target, 1, 16, stream)
        inside.set()
        time.sleep(0.1)
        order.append("captured")

    def other() -> None:
        inside.wait()
        driver("cuCtxSetCurrent", device.context)
        driver("cuMemAlloc", 256)
        order.append("allocated")

    def second() -> None:
        inside.wait()
        driver("cuCtxSetCurrent", device.context)
        own = driver.stream()
        driver.capture(own, lambda: driver("cuMemsetD8Async", target, 2, 16, own))
        assert gc.isenabled()

    threads = [threading.Thread(target=one) for one in (other, second)]
    for thread in threads:
        thread.start()
    driver.capture(stream, enqueue)
    for thread in threads:
        thread.join()
    assert order == ["captured", "allocated"] and gc.isenabled()
    machine.check()


@pytest.mark.parametrize("name", ["cuMemcpyAsync", "cuEventRecord", "cuStreamWaitEvent", "cuLaunchKernel"])
@pytest.mark.parametrize("peers", [True, False], ids=["peers", "no peers"])
def test_an_error_in_the_middle_of_a_round_leaves_nothing_running(name: str, peers: bool) -> None:
    """The n-th call fails, at every place in a round: the next image is right, and meets no work of the last one."""
    plan, options = schedule(6), Options(k=3)
    wanted = reference("aggressive", options, plan)
    if name == "cuMemcpyAsync" and not peers:
        name = "cuMemcpyDtoHAsync"
    for nth in range(1, 9):
        machine = Machine(3, seed=nth, eager=0, peers=peers)
        networks = [FunctionNetwork(machine, n, model) for n in (0, 1, 2)]
        backend = CudaBackend(Driver(), networks, "float32", KERNELS, graphs=False)
        machine.fail(name, nth, 719)
        with pytest.raises(DeviceError):
            run(backend, "aggressive", options, plan)
        assert distance(run(backend, "aggressive", options, plan), wanted) < 1e-5
        machine.check()
