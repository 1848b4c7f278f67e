"""`python -m bench simulate`: latency on machines that are not here, predicted on the null backend's virtual clock.

A sampler's real plan is played with the seconds of model calls, copies, sums and launches as a table gives them. It is
one image on several devices; fleets of replicas under load are `python -m bench cluster`.

- For the paper's machines the seconds of a model call come from its sequential row alone, and the other rows are
  predicted; nothing is fitted to them.
- The prediction is validated where lanes are at hand: the table is measured on them, in between the images whose
  seconds it must predict.
- What nobody measured is marked as assumed: links are typical of their kind, and one branch of a guided evaluation
  costs `--branch-share` of both together.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.models import model_arguments, one_lane
from bench.plots import png
from bench.simulation.figures import figure
from bench.simulation.predict import DEVICES, LINKS, Table, of_the_paper, options, predictions
from bench.simulation.tables import MEASURED, paper_table, prediction_table, validation_table
from bench.simulation.validate import record, validate
from engines.errors import ParameterError
from runtime.pipeline import Pipeline


def arguments(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    model_arguments(parser)
    parser.add_argument("--passes", type=int, default=6, help="measured images per sampler")
    parser.add_argument("--steps", type=int, default=50, help="of the validation")
    parser.add_argument("--guidance", type=float, nargs="+", default=[4.0, 1.0], dest="guidance_scales")
    parser.add_argument("--tolerance", type=float, default=0.01, help="of adaptive")
    parser.add_argument("--branch-share", type=float, default=0.56, help="of an evaluation, for one of its branches")
    parser.add_argument("--evaluation-seconds", type=float, default=0.005, help="of a fast device, assumed")
    parser.add_argument("--no-validation", action="store_false", dest="validation", help="predictions only: no model")
    parser.add_argument("--plot", type=Path, help="PNG of the predictions")


def measure(
    model: str, build: Path, devices: str, passes: int, steps: int, guidance_scales: Sequence[float], tolerance: float,
    branch_share: float, evaluation_seconds: float, plot: Path | None, *, validation: bool,
) -> list[dict[str, Any]]:  # fmt: skip
    """Predictions, the paper's points, and the validation on one lane and on the lanes that were asked for."""
    for name, value, low in (("passes", passes, 1), ("branch_share", branch_share, 0.5), ("steps", steps, 1)):
        if value < low:
            raise ParameterError(name, f"{name} must be at least {low:g}, not {value:g}")
    tables = [
        Table("SD 1.5 on V100", "the paper's 2.68 s for 50 steps on one V100", 2.68 / 50, 32 << 10),
        Table("SDXL on a fast device", f"{evaluation_seconds * 1e3:g} ms, assumed", evaluation_seconds, 128 << 10),
    ]
    recorded: dict[tuple[int, int], list[float]] = {}
    rows: list[dict[str, Any]] = []
    if validation:
        for lanes in dict.fromkeys((one_lane(devices), devices)):
            pipeline = Pipeline.load(model, lanes, build)
            try:
                rows += validate(pipeline, steps, guidance_scales, passes, tolerance)
                if lanes == devices:
                    ks = {options("adaptive", n, split=split).k for n in DEVICES for split in (False, True)}
                    recorded = record(pipeline, [table.steps for table in tables], ks)
            finally:
                pipeline.close()
        last = [row for row in rows if row["kind"] == "costs"][-1]
        lane = last["call_seconds"][max(last["call_seconds"])]
        name = f"{model}, one lane of this machine each"
        tables.append(Table(name, MEASURED, lane[2], last["latent_bytes"], branch_share=lane[1] / lane[2]))
    tables[:2] = [Table(t.name, t.source, t.evaluation, t.latent_bytes, t.steps, branch_share) for t in tables[:2]]
    rows += [{"kind": "table", **vars(table)} for table in tables]
    rows += [{"kind": "link", **vars(link)} for link in LINKS]
    rows += of_the_paper() + predictions(tables, recorded)
    if plot:
        with figure(rows) as drawn:
            png(drawn, plot)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The validation where there is one, the paper's points, and the predictions for one link."""
    return "\n\n".join(filter(None, (validation_table(rows), paper_table(rows), prediction_table(rows))))
