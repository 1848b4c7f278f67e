"""Plans that calibration lets through, against other images."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import robustness
from bench.robustness import kept, measure, table
from engines.store import Bundle


def row(calibration: list[float], other: list[float] | None, scheduler: str = "ddim") -> dict[str, Any]:
    def found(distances: list[float]) -> dict[str, Any]:
        return {"drift": distances, "psnr": [60 - 20 * math.log10(each / 0.001) for each in distances]}

    candidate = {"mode": "aggressive", "k": 3, "drafts": "corrected", "calibration": found(calibration),
                 "other": found(other) if other else None}  # fmt: skip
    return {"scheduler": scheduler, "steps": 50, "guidance_scale": 4.0, "candidates": [candidate]}


def test_only_what_the_rule_lets_through_counts() -> None:
    near = row([0.001] * 16, [0.001, 0.02])
    ((name, used),) = kept(near, 0.01)
    assert name == "aggressive, k = 3"
    np.testing.assert_allclose(used, [0.1, 2.0])
    assert not kept(near, 0.0005) and not kept(row([0.001] * 16, None), 0.01)
    assert not kept(row([0.001] * 15 + [0.02], [0.001]), 0.01), "one image outside"
    ((_, used),) = kept(near, None)  # 60 dB and 34 dB against 50
    np.testing.assert_allclose(used, [10**-0.5, 10**0.8009], rtol=1e-3)


def test_the_table_counts_images_and_plans_outside() -> None:
    rows = [row([0.001] * 16, [0.001] * 10), row([0.001] * 16, [0.02] * 10, "euler_a"), row([1.0] * 16, [1.0])]
    shown = table(rows)
    assert "| euler_a | 0.01 | 1 of 1 | 1 | 10 | 0.00 % | 2.00 | 2.00 | 1 |" in shown
    assert "| all | 0.01 | 2 of 3 | 2 | 20 | 50.00 % | 2.00 | 2.00 | 1 |" in shown
    assert "| ddim | 0.003 | 1 of 2 | 1 | 10 | 100.00 % | 0.33 | 0.33 | 0 |" in shown
    assert "| euler_a | 0.0" in shown and "| all | 50 dB | 2 of 3 |" in shown


def test_a_setting_is_measured_once_and_its_distances_are_those_of_calibration(
    shapes: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(robustness, "WORK", tmp_path)
    monkeypatch.setattr(robustness, "CALIBRATED", 2)
    monkeypatch.setattr(robustness, "HOPELESS", 9.0)
    arguments = str(shapes.folder), tmp_path, "cpu*2", 1, ("euler_a",), (3,), (1.0,)
    (found,) = measure(*arguments)
    for candidate in found["candidates"]:
        assert len(candidate["calibration"]["drift"]) == 2 and len(candidate["other"]["psnr"]) == 1
        assert all(value > 0 for value in candidate["other"]["drift"]), "three steps cannot be skipped unseen"
    monkeypatch.setattr(robustness, "distances", None)  # a second run reads what was stored
    assert measure(*arguments) == [found]
