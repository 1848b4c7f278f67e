"""The fleet simulator against closed forms of queueing, and the command end to end."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from bench import __main__ as command
from bench import cluster
from bench.cluster import GPUS, GUIDANCE, STEPS, Fleet, h100, table, wanted
from bench.gpu.engine import schedule
from bench.simulation.fleet import Kind, Loss, Replica, Request, arrivals, play
from engines.store import Bundle
from runtime.lane_policy import ALL_LANES, BATCHED, ELASTIC, REQUESTS_PER_LANE, WAIT_FACTOR, Policy
from runtime.sampling.operations import Options

ALONE = Kind(rounds=10, rows=1.0, alone=(1.0,), beside=0.0)  # a second on the only lane
PER_ROW = 0.1


def call(rows: int) -> float:
    """Batching gains nothing."""
    return PER_ROW * rows


def replicas(count: int, lanes: int = 1, policy: Policy = ELASTIC) -> list[Replica]:
    return [Replica(lanes, policy, call) for _ in range(count)]


def latencies(requests: list[Request]) -> np.ndarray:
    return np.array([one.latency for one in requests])


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_one_lane_is_the_queue_that_pollaczek_and_khinchine_solved(load: float) -> None:
    """M/D/1: the mean wait is load / (2 (1 − load)) of the service time."""
    found = latencies(play(arrivals("poisson", load, [ALONE], 40_000, seed=3), replicas(1)))
    assert found.mean() == pytest.approx(1 + load / (2 * (1 - load)), rel=0.06)


def test_calls_are_not_shared_where_that_gains_nothing() -> None:
    """First come, first served again, not processor sharing, whose mean is service / (1 − load)."""
    load = 0.5
    found = latencies(play(arrivals("poisson", load, [ALONE], 40_000, seed=4), replicas(1, policy=BATCHED)))
    assert found.mean() == pytest.approx(1 + load / (2 * (1 - load)), rel=0.06)


def test_two_choices_beat_one_queue_each() -> None:
    load, count = 0.8, 10
    many = arrivals("poisson", load * count, [ALONE], 40_000, seed=5)
    split = latencies(play(arrivals("poisson", load, [ALONE], 40_000, seed=5), replicas(1))).mean()
    assert latencies(play(many, replicas(count))).mean() < 0.7 * split


@pytest.mark.parametrize("lanes", GPUS)
def test_a_lone_request_takes_what_its_lanes_take(lanes: int) -> None:
    kind = Kind.of("aggressive", Options(k=4), schedule(STEPS), GUIDANCE, lanes, h100, 0.1)
    (one,) = play([(2.5, kind)], [Replica(lanes, ELASTIC, h100)])
    waits = WAIT_FACTOR if lanes > 1 else 1.0
    assert one.latency == pytest.approx((kind.alone[lanes - 1] - 0.1) * waits + 0.1)


def test_the_rule_of_the_server_decides() -> None:
    """Two requests at once on two lanes: half each under the server's rule, one after the other under all lanes."""
    kind = Kind(rounds=10, rows=2.0, alone=(2.0, 1.9), beside=0.0)
    asked = [(0.0, kind), (0.0, kind)]
    both = latencies(play(asked, replicas(1, 2)))
    assert both == pytest.approx([2.0, 2.0])
    first, second = latencies(play(asked, replicas(1, 2, ALL_LANES)))
    assert second == pytest.approx(2 * first) and first == pytest.approx(1.9 * WAIT_FACTOR)


@pytest.mark.parametrize("seed", range(20))
def test_an_idle_replica_of_two_is_found(seed: int) -> None:
    kind = Kind(rounds=10, rows=1.0, alone=(1.0,), beside=0.0)
    assert latencies(play([(0.0, kind)] * 2, replicas(2, 1), seed=seed)) == pytest.approx([1.0, 1.0])


def test_calls_are_filled_and_no_further() -> None:
    """Rows that cost nothing more: as many requests at once as a server runs, and all end together."""
    kind = Kind(rounds=10, rows=1.0, alone=(1.0,), beside=0.0)
    server = Replica(1, BATCHED, lambda rows: PER_ROW)
    found = latencies(play([(0.0, kind)] * (REQUESTS_PER_LANE + 1), [server]))
    assert found[:REQUESTS_PER_LANE] == pytest.approx(1.0) and found[-1] == pytest.approx(2.0)


@pytest.mark.parametrize("process", cluster.PROCESSES)
def test_arrivals_have_their_mean_rate(process: str) -> None:
    times = np.array([at for at, _ in arrivals(process, 20.0, [ALONE], 40_000, seed=6)])
    assert len(times) == 40_000 and (np.diff(times) >= 0).all()
    assert len(times) / times[-1] == pytest.approx(20.0, rel=0.1)
    counted, _ = np.histogram(times, 200)
    assert (counted.var() > 3 * counted.mean()) == (process != "poisson"), "the others come in waves"


def test_a_lost_zone_is_made_up_for_or_told() -> None:
    asked = arrivals("poisson", 2.0, [ALONE], 2000, seed=7)
    found = play(asked, replicas(6), Loss(at=300.0, share=1 / 3))
    caught = [one for one in found if one.lost]
    assert caught and all(one.latency < 60 for one in found), "every request is answered, once"
    assert all(one.arrived < 300.0 and one.arrived + one.latency > 300.0 for one in caught)
    assert sum(math.isnan(one.latency) for one in play(asked, replicas(6), Loss(at=300.0, share=1.0))) > 500


def test_the_fewest_keep_the_limit_and_one_less_does_not() -> None:
    fleet = Fleet(2, "sequential", "elastic", 3.0)
    found = fleet.fewest(2.0)
    assert found is not None and found[2] <= 2.0 < fleet.quantiles(found[0] - 1)[1]
    assert fleet.fewest(0.5) is None


def test_the_table_of_call_times_is_the_published_one() -> None:
    """30 steps with guidance and the rest take what the model card says; one branch what its version without does."""
    assert 30 * h100(2) + cluster.BESIDE == pytest.approx(1.471) and 4 * h100(1) == pytest.approx(0.1028)


def test_the_command_simulates_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cluster, "GPUS", (1, 2))
    monkeypatch.setattr(cluster, "wanted", lambda: [case for case in wanted() if case[0].rate == 1.0])
    monkeypatch.setattr(cluster, "USUAL_RATE", 3.0)
    target = tmp_path / "cluster.json"
    monkeypatch.setattr("sys.argv", ["bench", "cluster", "--no-validation", "--json", str(target)])
    assert command.main() == 0 and "sequential" in capsys.readouterr().out
    rows = json.loads(target.read_text())["rows"]
    assert {row["kind"] for row in rows} == {"table", "fleet", "zone"}
    assert len([row for row in rows if row["kind"] == "fleet"]) == 8
    monkeypatch.setattr("sys.argv", ["bench", "cluster", "--requests", "3"])
    assert command.main() == 1 and "at least 100" in capsys.readouterr().err


@pytest.mark.slow
def test_the_validation_asks_two_servers(shapes: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "LOADS_HERE", (0.3,))
    monkeypatch.setattr(cluster, "STEPS_HERE", (4, 6))
    rows = cluster.validate(str(shapes.folder), shapes.folder.parent, 12)
    assert [row["load"] for row in rows] == [0.3] and min(rows[0]["p50_measured"], rows[0]["p50_simulated"]) > 0
    assert "| 30 % |" in table(rows)
