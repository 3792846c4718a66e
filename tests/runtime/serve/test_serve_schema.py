"""Schemathesis generates valid and invalid requests from the server's own OpenAPI schema.

Every answer must conform to the schema: no 5xx, no undocumented status, body or type. Requests that
violate the schema must be refused.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.support.serving import serving

# `positive_data_acceptance` is left out: a valid request may be refused with 400 for what a JSON
# schema cannot express (the model's name, ids inside the vocabulary, a valid grammar).
CHECKS: Any = [
    not_a_server_error, status_code_conformance, content_type_conformance,
    response_headers_conformance, response_schema_conformance, negative_data_rejection,
]  # fmt: skip


MODES = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
OPERATIONS = [
    ("/health", "GET"), ("/ready", "GET"), ("/metrics", "GET"), ("/v1/models", "GET"),
    ("/v1/models/{name}", "GET"), ("/v1/completions", "POST"), ("/v1/chat/completions", "POST"),
]  # fmt: skip
ALWAYS_VALID = {path for path, method in OPERATIONS if method == "GET"}  # any name is valid


@pytest.fixture(scope="module")
def api(plain_bundle: Path) -> Iterator[Any]:
    with serving(plain_bundle, "--rows", 4, "--max-new-tokens", 16) as server:
        schema = server.ask("/openapi.json").json()
        for name in ("CompletionRequest", "ChatRequest"):  # otherwise every request would be a 404
            schema["components"]["schemas"][name]["properties"]["model"]["enum"] = ["tiny"]
        loaded = schemathesis.openapi.from_dict(schema)
        loaded.config.update(base_url=server.url)
        yield loaded
        assert server.ask("/health").status == 200
        assert server.metric("running_rows") == 0


def test_every_path_of_the_schema_is_tested(api: Any) -> None:
    found = [(operation.ok().path, operation.ok().method) for operation in api.get_all_operations()]
    assert sorted((path, method.upper()) for path, method in found) == sorted(OPERATIONS)


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.value)
@pytest.mark.parametrize(("path", "method"), OPERATIONS, ids=lambda value: value)
def test_the_server_answers_as_its_schema_specifies(
    api: Any, path: str, method: str, mode: GenerationMode
) -> None:
    if mode is GenerationMode.NEGATIVE and path in ALWAYS_VALID:
        pytest.skip("no body, and any name is valid: no request violates the schema")

    @settings(
        max_examples=40, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(case=api[path][method].as_strategy(generation_mode=mode))
    def answers(case: Any) -> None:
        case.call_and_validate(checks=CHECKS, timeout=60)

    answers()
