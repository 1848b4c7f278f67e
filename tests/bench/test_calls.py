"""One model call by runtime and precision."""

from __future__ import annotations

import numpy as np
import pytest

from bench import calls
from bench.calls import INT8, Model, measure, noisy_inputs, table, ways
from engines.errors import ParameterError
from engines.store import Bundle


@pytest.fixture(scope="module")
def model(shapes: Bundle) -> Model:
    return Model(shapes, noisy_inputs(shapes, 3, seed=1))


def test_inputs_are_noisy_latents_with_what_the_text_encoder_says(model: Model) -> None:
    sample, timestep = model.inputs["sample"], model.inputs["timestep"]
    assert sample.shape == (3, 4, 16, 16) and timestep.shape == (3,) and 0 <= timestep.min() <= timestep.max() < 1000
    hidden = model.inputs["encoder_hidden_states"]
    assert hidden.shape[0] == 3 and not np.array_equal(hidden[0], hidden[1])
    assert 0.5 < sample.std() < 2, "unit variance, or of the latents"


@pytest.mark.parametrize("rows", [1, 3])
def test_every_way_computes_the_same(model: Model, rows: int) -> None:
    inputs = model.rows(rows)
    outputs = {key: run(inputs) for key, run in ways(model, None, rows).items()}
    reference = outputs["onnxruntime", "dynamic", "fp32"]
    assert reference.shape == inputs["sample"].shape and {runtime for runtime, _, _ in outputs} >= {"onnxruntime"}
    for (_, _, precision), output in outputs.items():
        np.testing.assert_allclose(output, reference, atol={"fp32": 1e-4, "bf16": 0.2}[precision], rtol=0)


def test_a_row_per_way_and_what_is_missing_is_said(shapes: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "find_spec", lambda name: None)
    monkeypatch.setattr(calls, "EMBEDDED", str(shapes.folder))
    found = measure(shapes.folder.parent, (2,), 2, 0)
    first = found[0]
    assert first["runtime"] == "onnxruntime" and first["batches"]["2"]["speedup"]["median"] == 1
    assert first["batches"]["2"]["error"] == 0 and first["batches"]["2"]["ms_per_row"]["median"] > 0
    assert found[-1] == {
        "way": INT8,
        "status": "not possible here",
        "reason": "NNCF is not installed: pip install nncf",
    }
    shown = table(found)
    assert "| onnxruntime | static | fp32 |" in shown and "int8: NNCF is not installed" in shown


def test_numbers_that_measure_nothing_are_refused(shapes: Bundle) -> None:
    for rows, repeats, images in (((0,), 1, 0), ((1,), 0, 0), ((1,), 1, -1)):
        with pytest.raises(ParameterError, match="at least 1"):
            measure(shapes.folder.parent, rows, repeats, images)
