"""The OpenAPI document: valid, and no request that follows it, or does not, is an internal error."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from openapi_spec_validator import OpenAPIV31SpecValidator

from tests.support.front import Front
from tests.support.tokens import VOCAB_SIZE

EXAMPLES = 8
"""Of each operation, always the same ones."""


@pytest.fixture(scope="module")
def quick(model: Path) -> Iterator[Front]:
    """A front whose answers are short whatever is asked for."""
    with Front(model, vocab_size=VOCAB_SIZE, context_length=64) as running:
        yield running


def test_the_document_is_valid(front: Front) -> None:
    errors = list(OpenAPIV31SpecValidator(front.get("/openapi.json").json).iter_errors())
    assert errors == []


def operations(front: Front) -> list[Any]:
    schema = schemathesis.openapi.from_dict(front.get("/openapi.json").json)
    return [result.ok() for result in schema.get_all_operations()]  # type: ignore[union-attr]


def test_nothing_that_follows_the_document_is_an_internal_error(quick: Front) -> None:
    asked = 0
    for operation in operations(quick):
        if operation.path == "/health_generate":
            continue

        @settings(
            max_examples=EXAMPLES,
            derandomize=True,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy())
        def ask(case: Any) -> None:
            nonlocal asked
            asked += 1
            response = case.call(base_url=quick.url, timeout=20)
            assert response.status_code != 500, f"{case.as_curl_command()}: {response.text}"
            if response.status_code >= 400 and "json" in response.headers.get("content-type", ""):
                assert response.json()["error"]["message"]

        ask()
    assert asked > 20 * EXAMPLES
