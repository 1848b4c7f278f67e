"""Options are written once: the signature, the command line, the HTTP API and the tables all follow `OPTIONS`."""

from __future__ import annotations

import argparse
import inspect
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from engines.errors import ParameterError
from engines.store import Bundle
from runtime.__main__ import arguments
from runtime.call import CALLBACKS, OPTIONS, Call, add_options, markdown, read_arguments
from runtime.pipeline import Pipeline
from runtime.serve.openai.schema import EditBody

PROMPT = "a small green ring at the top"
# of the command line: what a run loads and where it writes, which says nothing about the image
OWN_FLAGS = {"--help", "--version", "--model", "--devices", "--save-latents", "--out", "--report", "--build", "--quiet",
    "--no-metadata",
}  # fmt: skip
# of OpenAI's API: the model, how images are sent, and what is accepted without effect
OWN_FIELDS = {
    "model", "response_format", "output_format", "output_compression", "quality", "background", "stream",
    "partial_images", "moderation", "user", "safety_identifier", "style", "metadata",
}  # fmt: skip


def test_generate_takes_every_option_and_callback_with_its_default() -> None:
    parameters = dict(inspect.signature(Pipeline.generate).parameters)
    assert parameters.pop("self")
    assert list(parameters) == [*OPTIONS, *CALLBACKS]
    assert {name: parameters[name].default for name in OPTIONS} == {n: one.default for n, one in OPTIONS.items()}
    kinds = {name: one.kind for name, one in parameters.items()}
    assert kinds.pop("prompt") is inspect.Parameter.POSITIONAL_OR_KEYWORD
    assert set(kinds.values()) == {inspect.Parameter.KEYWORD_ONLY}


def test_the_command_line_has_every_option_with_a_flag_and_no_other() -> None:
    actions = {action.dest: action for action in arguments()._actions}
    flags = {option.flag for option in OPTIONS.values() if option.flag}
    found = {name for action in actions.values() for name in action.option_strings or [action.dest] if name != "-h"}
    assert found == flags | OWN_FLAGS
    for option in OPTIONS.values():
        if option.flag and option.name != "prompt":
            assert actions[option.name].default == option.default, option.name
            assert option.help in str(actions[option.name].help).replace("%%", "%")


def test_http_has_every_option_with_a_field_and_no_other(shapes: Bundle) -> None:
    wanted = {option.http for option in OPTIONS.values() if option.http}
    assert set(EditBody.model_fields) == wanted | OWN_FIELDS
    schema = EditBody.model_json_schema()["properties"]
    for option in OPTIONS.values():
        if option.http is None or option.http == "size":
            continue
        field: dict[str, Any] = next(
            (one for one in schema[option.http].get("anyOf", []) if one.get("type") != "null"), {}
        )
        field = schema[option.http] | field
        if option.choices:
            assert tuple(one for one in field["enum"] if one) == option.choices
        if option.kind in (int, float) and option.http != "n":  # a server sets the largest n
            assert (field.get("minimum"), field.get("maximum")) == option.http_range, option.name


def test_the_tables_name_every_option() -> None:
    rows = markdown().splitlines()[2:]
    assert [row.split("`")[1] for row in rows] == list(OPTIONS)
    assert "| `seed` | whole number, -1 to 2⁶⁴ − 1 | `0` |" in markdown()
    served = {row.split("`")[1] for row in markdown(http=True).splitlines()[2:]}
    assert served == {option.http for option in OPTIONS.values() if option.http}
    assert "| `k` | whole number, 1 to 64 |" in markdown(["k"], http=True)


def test_a_command_may_take_some_options_with_defaults_of_its_own() -> None:
    parser = argparse.ArgumentParser()
    add_options(parser, ["k", "tolerance", "pipelined", "first_blocks"], {"tolerance": 0.01})
    assert vars(parser.parse_args([])) == {"k": None, "tolerance": 0.01, "pipelined": True, "first_blocks": ()}
    given = parser.parse_args(["--k", "3", "--plain", "--first-blocks", "1", "2"])
    assert (given.k, given.pipelined, given.first_blocks) == (3, False, [1, 2])
    assert "default: 0.01" in parser.format_help()


def test_values_come_in_plain_types_and_cannot_be_changed() -> None:
    given: dict[str, Any] = {"seed": np.int64(3), "first_blocks": [1, np.int32(2)], "tolerance": 0}
    call = Call(PROMPT, mode="aggressive", **given)
    assert call.first_blocks == (1, 2) and type(call.seed) is int and type(call.tolerance) is float
    with pytest.raises(AttributeError):
        call.seed = 4  # type: ignore[misc]
    assert replace(call, seed=4).first_blocks == (1, 2)


def test_minus_one_chooses_a_seed_once() -> None:
    chosen = {Call(PROMPT, seed=-1).seed for _ in range(20)}
    assert len(chosen) > 15 and min(chosen) >= 0 and max(chosen) < 2**32
    call = Call(PROMPT, seed=-1)
    assert replace(call, width=64).seed == call.seed, "what the report says makes the image again"


@pytest.mark.parametrize(
    ("options", "param", "message"),
    [
        ({"steps": 3}, "steps", "no argument steps"),
        ({"guidence_scale": 3}, "guidence_scale", "did you mean guidance_scale"),
        ({"progres": None}, "progres", "did you mean progress"),
        ({"pipelined": 1}, "pipelined", "True or False"),
        ({"mode": "conservative", "first_blocks": 3}, "first_blocks", "list"),
        ({"mode": "conservative", "first_blocks": [2, 0]}, "first_blocks", "from 1 to 1000, not 0"),
        ({"mode": ["auto"]}, "mode", "unknown mode"),
        ({"seed": 1.0}, "seed", "whole number"),
        ({"eta": None}, "eta", "number from 0 to 1, not None"),
        ({"k": 2}, "k", "mode auto chooses k itself"),
        ({"first_blocks": [2]}, "first_blocks", "mode auto chooses first_blocks itself"),
    ],
)
def test_what_no_model_could_use_is_refused_before_there_is_one(
    options: dict[str, Any], param: str, message: str
) -> None:
    with pytest.raises(ParameterError, match=message) as caught:
        read_arguments(PROMPT, **options)
    assert caught.value.param == param


def test_the_model_fills_in_its_defaults_and_narrows_the_ranges(shapes: Bundle) -> None:
    manifest = shapes.manifest
    checked = Call(PROMPT).checked(manifest, 2, 5)
    assert (checked.k, checked.lanes, checked.num_inference_steps) == (5, 2, manifest.defaults.num_inference_steps)
    assert checked.guidance_scale == manifest.defaults.guidance_scale and checked.prompt == PROMPT
    wide = Call(PROMPT, mode="srds", lanes=3, blocks=9, num_inference_steps=8, k=1)
    for call, param, message in (
        (wide, "lanes", "from 1 to 2"),
        (replace(wide, lanes=1), "blocks", "from 1 to 8"),
        (replace(wide, num_inference_steps=1001), "num_inference_steps", "from 1 to 1000"),
    ):
        with pytest.raises(ParameterError, match=message) as caught:
            call.checked(manifest, 2, 5)
        assert caught.value.param == param


def test_a_call_makes_the_image_that_its_arguments_make(shapes: Bundle) -> None:
    pipeline = Pipeline(shapes, "cpu@1")
    options: dict[str, Any] = {"num_inference_steps": 2, "seed": 9, "mode": "sequential"}
    start = Image.effect_noise((64, 64), 60).convert("RGB")
    shown: list[int] = []
    with pytest.raises(ParameterError, match="did you mean seed"):
        pipeline.generate(PROMPT, sed=9)  # type: ignore[call-arg]
    for more in ({}, {"image": start, "strength": 0.6, "num_inference_steps": 4}):
        made = pipeline.run(Call(PROMPT, **options | more))
        given = pipeline.generate(PROMPT, **options | more, progress=lambda finished, steps: shown.append(finished))
        assert np.array_equal(made.latents, given.latents)
    assert shown == [1, 2, 1, 2]
    pipeline.close()
