"""Open-loop load with every image compared."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from bench import __main__ as command
from bench.loadtest import Answer, added, play, poisson, read, row, wrong
from engines.errors import EngineError, ParameterError
from runtime.pipeline import Pipeline


@pytest.fixture
def url(client: httpx.Client) -> str:
    return str(client.base_url).rstrip("/")


def test_arrivals_are_poisson_and_the_same_every_time() -> None:
    asked = poisson(5.0, 4000, 8, ("a", "b"))
    gaps = [b["at"] - a["at"] for a, b in itertools.pairwise(asked)]
    assert sum(gaps) / len(gaps) == pytest.approx(0.2, rel=0.05)
    assert sum(gap > 0.2 for gap in gaps) / len(gaps) == pytest.approx(0.3679, abs=0.03)
    assert poisson(5.0, 4000, 8, ("a", "b")) == asked


def test_a_trace_is_played_in_its_time_and_its_images_compared(url: str, pipeline: Pipeline, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    lines: list[dict[str, Any]] = [
        {"at": 0.4, "prompt": "a small green ring", "seed": 3, "num_inference_steps": 2},
        {"at": 0.0, "prompt": "a red star", "num_inference_steps": 40, "mode": "sequential"},
        {"at": 0.1, "prompt": "a red star", "num_inference_steps": 1001},
    ]
    trace.write_text("\n\n".join(map(json.dumps, lines)))
    asked = read(trace)
    assert [one["at"] for one in asked] == [0.0, 0.1, 0.4]
    answers = play(url, asked, None)
    assert [one.status for one in answers] == [200, 400, 200]
    assert max(one.late for one in answers) < 0.2
    assert wrong(pipeline, asked, answers) == []
    told = row(asked, answers, [])
    assert (told["status"], told["outcomes"], told["compared"]) == ("failed", {"200": 2, "400": 1}, 2)
    assert "num_inference_steps" in told["reasons"][0]
    # the image of another seed is found out
    assert wrong(pipeline, [{**one, "seed": 5} for one in asked], answers) == [0, 2]


def test_what_is_refused_under_load_is_counted_and_what_is_lost_fails() -> None:
    asked = [{"at": 0.0}, {"at": 1.0}]
    good = Answer(0.0, 0.5, 200)
    assert row(asked, [good, Answer(0.0, 0.1, 429, reason="full")], [])["status"] == "ok"
    lost = row(asked, [good, Answer(0.0, 0.1, 0, reason="ConnectionResetError()")], [])
    assert (lost["status"], lost["outcomes"]) == ("failed", {"200": 1, "none": 1})
    assert row(asked, [good, good], [1])["status"] == "failed"


def test_what_one_server_adds_to_itself_is_about_nothing(url: str) -> None:
    told = added(url, url, {"prompt": "a red star", "num_inference_steps": 1}, None, 5)
    assert abs(told["milliseconds"]["p50"]) < told["alone_p50"]["second"]


def test_the_command(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["bench", "loadtest", url, "--requests", "4", "--rate", "20", "--steps", "2"]
    monkeypatch.setattr("sys.argv", [*words, "--json", str(tmp_path / "x.json")])
    assert command.main() == 0
    assert re.search(r"4 requests: 4 × 200; .*\n.*\n4 images compared by seed, 0 wrong", capsys.readouterr().out)
    assert json.loads((tmp_path / "x.json").read_text())["rows"][0]["wrong"] == []


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", ":1: "),
        ("[]", "an object with the seconds"),
        ('{"at": -1}', "from 0 on"),
        ('{"at": NaN}', "from 0 on"),
        ('{"at": 0, "sede": 1}', "no field 'sede'"),
        ("", "has no request"),
    ],
)
def test_a_trace_that_is_none_is_one_message(line: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "trace").write_text(line)
    with pytest.raises(ParameterError, match=re.escape(words)):
        read(tmp_path / "trace")


def test_an_address_that_is_none() -> None:
    with pytest.raises(EngineError, match=r"'localhost:1' is no address of a server: write http://HOST:PORT"):
        play("localhost:1", [{"at": 0.0}], None)
