"""`auto` on processor cores: the runtime that was measured to be fastest, and the default one where nothing was."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from engines import choice, devices
from engines.__main__ import main
from engines.choice import FILE, Measured, lanes_of, measure, runtimes
from engines.devices import LaneSpec, parse_devices
from engines.runtimes import RUNTIMES, Runtime
from engines.store import Bundle

pytestmark = pytest.mark.skipif(not RUNTIMES["openvino"].installed, reason="there is nothing to choose from")


@pytest.fixture
def bundle(shapes: Bundle, tmp_path: Path) -> Bundle:
    """Only its manifest: nothing is run."""
    shapes.manifest.write(tmp_path)
    return Bundle.open(str(tmp_path))


def timed(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, seconds: dict[str, float]) -> Measured:
    def known(_: Bundle, lanes: Sequence[LaneSpec]) -> float:
        return seconds[lanes[0].runtime]

    monkeypatch.setattr(choice, "_seconds", known)
    return measure(bundle, parse_devices("auto"))


def chosen(bundle: Bundle, text: str = "auto") -> set[str]:
    return {lane.runtime for lane in lanes_of(text, bundle)}


@pytest.mark.parametrize("fastest", ["onnxruntime", "openvino"])
def test_auto_is_what_was_fastest(fastest: str, bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(runtimes(bundle)) == {"onnxruntime", "openvino"}
    assert chosen(bundle) == {"onnxruntime"}  # before anything was measured
    found = timed(bundle, monkeypatch, {"onnxruntime": 0.02, "openvino": 0.02} | {fastest: 0.01})
    assert chosen(bundle) == {fastest}
    assert str(found).startswith(f"{RUNTIMES[fastest].title} 10.0 ms, ")
    assert [lane.threads for lane in lanes_of("auto", bundle)] == [lane.threads for lane in parse_devices("auto")]


def test_a_name_is_never_changed(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    timed(bundle, monkeypatch, {"onnxruntime": 0.02, "openvino": 0.01})
    assert chosen(bundle, "cpu*2") == {"onnxruntime"}
    assert chosen(bundle, "cpu@1") == {"onnxruntime"}
    timed(bundle, monkeypatch, {"onnxruntime": 0.01, "openvino": 0.02})
    assert chosen(bundle, "cpu*2@openvino") == {"openvino"}


def test_what_was_measured_of_something_else_does_not_count(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    timed(bundle, monkeypatch, {"onnxruntime": 0.02, "openvino": 0.01})
    path = bundle.folder / FILE
    content = json.loads(path.read_text())
    several: tuple[dict[str, object], ...] = (
        content | {"lanes": content["lanes"] + 1},
        content | {"plans": content["plans"] | {"openvino": "0123"}},
        content | {"schema_version": 2},
        {},
    )
    for changed in several:
        path.write_text(json.dumps(changed))
        assert chosen(bundle) == {"onnxruntime"}
    path.write_text(json.dumps(content))
    assert chosen(bundle) == {"openvino"}
    monkeypatch.setattr(devices, "machine", lambda: "another")
    from engines import openvino

    monkeypatch.setattr(openvino, "machine", lambda: "another CPU")
    assert chosen(bundle) == {"onnxruntime"}


def test_a_runtime_that_was_removed_is_not_chosen(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    timed(bundle, monkeypatch, {"onnxruntime": 0.02, "openvino": 0.01})
    monkeypatch.setattr(Runtime, "installed", property(lambda self: self.package == "onnxruntime"))
    assert chosen(bundle) == {"onnxruntime"}


def test_build_measures_once_and_says_what_it_found(
    shapes: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the real runtimes, in the bundle of `make engines`."""
    monkeypatch.setattr("sys.argv", ["engines", "build", str(shapes.folder), "--devices", "auto"])
    assert main() == 0
    first = capsys.readouterr().out.splitlines()[-1]
    known = Measured.read(shapes)
    assert known is not None and known.of(shapes, parse_devices("auto")) and min(known.seconds.values()) > 0
    fastest = min(known.seconds, key=lambda name: known.seconds[name])
    assert first == f"shapes: auto runs on {RUNTIMES[fastest].title} ({known})"
    monkeypatch.setattr(choice, "_seconds", lambda *_: pytest.fail("measured again"))
    assert main() == 0
    assert capsys.readouterr().out.splitlines()[-1] == first
