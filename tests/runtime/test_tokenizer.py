"""Words that a model has never seen; what is cut and multi-vector tokens are compared with diffusers per family."""

from __future__ import annotations

import re

import numpy as np
import pytest

from engines.store import Bundle
from export.shapes.data import WORDS, random_scene
from runtime.pipeline import Pipeline
from runtime.tokenizer import PromptTokenizer


def test_the_words_are_those_of_all_captions(shapes: Bundle, rng: np.random.Generator) -> None:
    said: set[str] = set()
    for number in range(600):
        scene = random_scene(rng, 1 + number % 2)
        said |= {*re.findall(r"\w+", scene.caption()), *re.findall(r"\w+", scene.loose_caption(rng))}
    assert said == set(WORDS) == set(shapes.manifest.words)


@pytest.mark.parametrize(
    ("prompt", "unknown"),
    [
        ("A large RED star, at the left", ""), ("an elephant at the left", "an, elephant"), ("3 red stars", "3, stars"),
        ("ein roter Stern über", "ein, roter, stern, über"), ("", ""),
    ],
)  # fmt: skip
def test_unknown_words_get_a_warning(shapes: Bundle, prompt: str, unknown: str) -> None:
    _, warnings = PromptTokenizer(shapes)([prompt, "a red star"])
    assert [one.split(" without ")[1].split(" and draws")[0] for one in warnings] == ([unknown] if unknown else [])
    if unknown:
        assert "its words are a, and, at, background" in warnings[0]


def test_the_report_has_it_and_negative_prompts_count(pipeline: Pipeline) -> None:
    report = pipeline.generate("a red star", negative_prompt="a dog", num_inference_steps=1).report
    assert len(report.warnings) == 1 and "without dog and draws" in report.warnings[0]
