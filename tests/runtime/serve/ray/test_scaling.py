"""How many replicas the accepted work wants. Needs no ray."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from runtime.serve.ray import scaling
from runtime.serve.ray.scaling import DeviceSeconds, OnePerNode


def wanted(policy: DeviceSeconds, seconds: list[float], requests: list[float], waiting: float = 0) -> float:
    metrics = {"device_seconds": dict(enumerate(seconds)), "requests": dict(enumerate(requests))}
    number, _ = policy(SimpleNamespace(aggregated_metrics=metrics, total_queued_requests=waiting))
    return number


def test_work_is_counted_in_device_seconds_not_in_requests() -> None:
    policy = DeviceSeconds(seconds=2.0, lanes=2)
    assert wanted(policy, [8.0, 4.0], [1, 1]) == pytest.approx(3)
    assert wanted(policy, [8.0, 4.0], [40, 40]) == pytest.approx(3)
    assert wanted(policy, [0.0, 0.0], [0, 0]) == 0


def test_requests_that_no_replica_has_cost_what_others_did() -> None:
    policy = DeviceSeconds(seconds=1.0, lanes=2)
    assert wanted(policy, [3.0, 1.0], [1, 1], waiting=3) == pytest.approx((4 + 3 * 2) / 2)
    assert wanted(policy, [0.0], [0], waiting=3) == pytest.approx(3 * 2 / 2), "what the last ones cost"


def test_before_any_report_a_waiting_request_is_a_lanes_work() -> None:
    policy = DeviceSeconds(seconds=1.5, lanes=4)
    assert policy(SimpleNamespace(aggregated_metrics=None, total_queued_requests=None))[0] == 0
    assert policy(SimpleNamespace(aggregated_metrics={}, total_queued_requests=8))[0] == pytest.approx(2)


def test_ingresses_follow_the_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = iter([3, 2])
    policy = OnePerNode(lambda: next(counts))
    assert [policy(None)[0] for _ in range(50)] == [3] * 50, "the nodes are not counted every time"
    monkeypatch.setattr(scaling, "NODES_SECONDS", 0.0)
    policy._until = 0.0
    assert policy(None)[0] == 2
