"""Models end when they are closed, and refuse to work in a process that was forked from theirs."""

from __future__ import annotations

import gc
import multiprocessing
import os
import subprocess
import sys
import textwrap
import weakref
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from engines.errors import DeviceError, EngineError
from engines.process import Owner
from engines.store import Bundle
from runtime import Pipeline
from tests import ROOT

TASKS = Path("/proc/self/task")


def test_the_owner_itself_is_no_other_process() -> None:
    Owner().check()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Python warns of forks beside threads, which is the point
@pytest.mark.parametrize("call", ["generate", "probe", "encode"])
def test_a_forked_process_is_told_at_once(pipeline: Pipeline, call: str) -> None:
    """Without the check the child waits for lanes whose threads it has not inherited, for ever."""
    pipeline.generate("a large red star", num_inference_steps=1)

    def child(pipe: Connection) -> None:
        try:
            if call == "generate":
                pipeline.generate("a large red star", num_inference_steps=1)
            elif call == "probe":
                pipeline.probe()
            else:
                pipeline.generate("a large red star", num_inference_steps=1, seed=3)
        except EngineError as error:
            pipe.send(str(error))
        os._exit(0)

    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=child, args=(theirs,))
    process.start()
    try:
        assert ours.poll(20), "the child hangs"
        assert "load it after the fork" in ours.recv()
    finally:
        process.kill()
        process.join()
    pipeline.generate("a large red star", num_inference_steps=1)  # the parent goes on


@pytest.mark.slow
def test_thirty_models_leave_no_memory_and_no_threads(shapes: Bundle) -> None:
    """As a service does that changes its model now and then."""
    code = f"""
        import os
        from runtime import Pipeline
        def used():
            with open("/proc/self/statm") as file:
                pages = int(file.read().split()[1])
            return pages * os.sysconf("SC_PAGE_SIZE") / 1e6, len(os.listdir("/proc/self/task"))
        for n in range(34):
            pipeline = Pipeline.load({str(shapes.folder)!r}, devices="cpu*2")
            pipeline.generate("a large red star", num_inference_steps=2, seed=n)
            pipeline.close()
            if n == 3:
                before = used()
        print(*before, *used())
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    before, threads_before, after, threads_after = map(float, run.stdout.split())
    assert after - before < 20 and threads_after == threads_before, run.stdout


def test_a_closed_model_says_so(shapes: Bundle) -> None:
    pipeline = Pipeline(shapes, "cpu")
    pipeline.close()
    with pytest.raises(DeviceError, match="the model is closed: load it again"):
        pipeline.generate("a large red star", num_inference_steps=1)


def test_networks_are_freed_when_they_are_closed(shapes: Bundle) -> None:
    """At once: nothing waits for the garbage collector, which is off."""
    pipeline = Pipeline(shapes, "cpu*2")
    pipeline.generate("a large red star", num_inference_steps=2)
    threads = len(list(TASKS.iterdir()))
    engines: Any = pipeline.machine.engines
    sessions = [weakref.ref(one._session) for one in (*engines.runners.values(), *engines._sessions)]
    # lanes of one thread share a session; those of several have one each
    assert len(sessions) in (4, 5) and all(session() is not None for session in sessions)
    gc.disable()
    try:
        pipeline.close()
        assert [session() for session in sessions] == [None] * len(sessions)
        assert len(list(TASKS.iterdir())) < threads
    finally:
        gc.enable()
