"""The OpenAPI document, driven by schemathesis: generated requests of every kind, and answers as the document says."""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings, strategies
from hypothesis.errors import Unsatisfiable
from PIL import Image
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance

from runtime.pipeline import Pipeline
from runtime.serve.limits import Limits
from runtime.serve.openai.schema import ImageBody
from tests.client import GENERATE, ask, serving

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(scope="module")
def client(pipeline: Pipeline) -> Iterator[httpx.Client]:
    """A server whose images are quick."""
    with serving(pipeline, Limits(steps=2, n=2, prompt=200, body=20_000)) as connected:
        yield connected


def a_png() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "teal").save(buffer, "PNG")
    return buffer.getvalue()


# files that are images, among files that are anything
schemathesis.openapi.format("binary", strategies.one_of(strategies.just(a_png()), strategies.binary()))


def drive(client: httpx.Client, examples: int) -> Counter[tuple[str, int]]:
    """Answers by operation and status; raises what schemathesis finds.

    That a request fits the schema does not mean that it can be made: some fields exclude each other, which a JSON
    schema cannot say, so that alone is no failure.
    """
    schema = schemathesis.openapi.from_url(str(client.base_url.join("/openapi.json")))
    seen: Counter[tuple[str, int]] = Counter()
    for found in schema.get_all_operations():
        operation: Any = found.ok()  # type: ignore[union-attr]
        number = examples if operation.method == "post" else max(2, examples // 20)
        for mode in GenerationMode:
            seen.update((operation.label, status) for status in answers(operation, mode, number))
    return seen


def answers(operation: Any, mode: GenerationMode, examples: int) -> list[int]:
    """The statuses of generated calls of one operation."""
    statuses = []
    # in a form everything is a text: what breaks the schema of a value may be another one that does not
    excluded = [positive_data_acceptance, *([negative_data_rejection] if "edits" in operation.label else [])]

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), database=None,
        phases=[Phase.generate],
    )  # fmt: skip
    def called(case: Any) -> None:
        response = case.call()
        statuses.append(response.status_code)
        case.validate_response(response, excluded_checks=excluded)

    try:
        called()
    except Unsatisfiable:  # an operation without parameters: no call of it can be wrong
        assert mode is GenerationMode.NEGATIVE and not operation.body
    return statuses


def test_generated_requests_are_answered_as_documented(client: httpx.Client) -> None:
    seen = drive(client, 60)
    assert {label for label, _ in seen} == {
        "POST /v1/images/generations", "POST /v1/images/edits",
        "GET /v1/models", "GET /v1/models/{model}", "GET /health/live", "GET /health/ready", "GET /metrics",
        "GET /",
    }  # fmt: skip
    assert seen["POST /v1/images/generations", 200] and seen["POST /v1/images/generations", 400]
    assert ask(client, num_inference_steps=2)["data"]


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_thousands_of_generated_requests(client: httpx.Client) -> None:
    seen = drive(client, int(os.environ.get("SOAK_CASES", "1200")))
    print(seen)
    assert sum(seen.values()) >= 2000 and not [status for _, status in seen if status >= 500]
    assert ask(client, num_inference_steps=2)["data"]


def test_the_openapi_document_describes_the_request(client: httpx.Client) -> None:
    document = client.get("/openapi.json").json()
    body = document["paths"][GENERATE]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert set(body["properties"]) == set(ImageBody.model_fields)
    assert body["additionalProperties"] is False
    assert set(document["paths"]) >= {GENERATE, "/v1/models", "/health/live", "/health/ready", "/metrics"}
