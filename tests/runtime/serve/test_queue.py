"""The queue alone: order, room, cancelling, deadlines, draining."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from runtime.call import Call
from runtime.serve.logs import REQUEST_ID
from runtime.serve.queue import RequestQueue
from runtime.serve.request import CancelledError, DeadlineError, DrainingError, QueueFullError, Request


def submitted(queue: RequestQueue, work: Callable[[Request], Any], seconds: float = 60) -> Request:
    request = Request(Call("a star"), work, seconds)
    queue.submit(request)
    return request


def blocked(queue: RequestQueue) -> tuple[Request, threading.Event]:
    """A request that holds the engine until it is told."""
    held, begun = threading.Event(), threading.Event()

    def work(request: Request) -> str:
        begun.set()
        assert held.wait(20)
        request.check()
        return "done"

    request = submitted(queue, work)
    assert begun.wait(20)
    return request, held


def made(request: Request) -> str:
    return "made"


def test_requests_run_in_order_and_the_queue_has_an_end() -> None:
    queue, order = RequestQueue(3), []

    def noting(number: int) -> Callable[[Request], None]:
        return lambda request: order.append(number)

    first, held = blocked(queue)
    others = [submitted(queue, noting(n)) for n in range(3)]
    with pytest.raises(QueueFullError, match="3 requests are waiting already: try again in 4 s"):
        submitted(queue, noting(9))
    held.set()
    assert first.future.result(20) == "done"
    for request in others:
        request.future.result(20)
    assert order == [0, 1, 2]
    assert queue.depth == 0
    queue.close()


def test_urgent_requests_pass_others_that_wait() -> None:
    queue, order = RequestQueue(9), []
    first, held = blocked(queue)
    others = [
        Request(Call("a star", priority=priority), lambda one: order.append(one.call.priority), 60)
        for priority in (5, 9, 1, 5, 2)
    ]
    for one in others:
        queue.submit(one)
    held.set()
    for one in (first, *others):
        one.future.result(20)
    assert order == [1, 2, 5, 5, 9]
    queue.close()


def test_a_request_that_is_too_old_or_cancelled_does_not_start() -> None:
    queue = RequestQueue(9)
    first, held = blocked(queue)
    late, unwanted = submitted(queue, made, 0.05), submitted(queue, made)
    unwanted.cancel()
    assert queue.depth == 2 and unwanted.future.done(), "it leaves at once"
    time.sleep(0.1)
    first.cancel()
    held.set()
    with pytest.raises(CancelledError):
        first.future.result(20)
    with pytest.raises(DeadlineError, match=r"0\.05 s old in the queue"):
        late.future.result(20)
    with pytest.raises(CancelledError):
        unwanted.future.result(20)
    assert submitted(queue, made).future.result(20) == "made"
    queue.close()


def test_draining_finishes_refuses_and_then_cancels() -> None:
    queue = RequestQueue(9)
    first, held = blocked(queue)
    second = submitted(queue, made)
    with ThreadPoolExecutor(1) as pool:
        drained = pool.submit(queue.drain, 20)
        while not queue.draining:
            time.sleep(0.001)
        with pytest.raises(DrainingError, match="is shutting down"):
            submitted(queue, made)
        held.set()
        assert drained.result(20) == 0
    assert first.future.result(1) == "done" and second.future.result(1) == "made"

    queue = RequestQueue(9)
    first, held = blocked(queue)
    second = submitted(queue, made)
    assert queue.drain(0.1, grace=0.1) == 2 and queue.depth == 1, "who waits leaves at once, who is at work cannot"
    held.set()
    for request in (first, second):
        with pytest.raises(DrainingError, match=r"within 0\.1 s"):
            request.future.result(20)


def test_a_request_that_is_late_is_late_whoever_says_so() -> None:
    request = Request(Call("a star"), made, 0.0)
    time.sleep(0.01)
    assert request.seconds_left < 0
    with pytest.raises(DeadlineError, match=str(request.deadline_error())):
        request.check()


def test_the_threads_of_the_engine_know_the_id_of_their_request() -> None:
    """Their log lines carry it, whether or not the protocol sets it where it accepts a request."""
    queue = RequestQueue(9, lanes=2)
    ids = [submitted(queue, lambda request: (request.id, REQUEST_ID.get())) for _ in range(8)]
    assert all(one.future.result(20) == (one.id, one.id) for one in ids)
    assert len({one.id for one in ids}) == 8 and REQUEST_ID.get() == ""
    queue.close()
