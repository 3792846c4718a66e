"""Schemathesis makes requests out of the server's own OpenAPI schema, right ones and wrong ones.

Every answer must be one that the schema announces: no 5xx, no undocumented status, body or type,
and nothing that breaks the schema accepted.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.serving import serving

# Left out is `positive_data_acceptance`: what a JSON schema cannot say (the model's name, a token
# that the vocabulary has, a grammar that can be followed) is refused with 400, and should be.
CHECKS: Any = [
    not_a_server_error, status_code_conformance, content_type_conformance,
    response_headers_conformance, response_schema_conformance, negative_data_rejection,
]  # fmt: skip


@pytest.fixture(scope="module")
def api(plain_bundle: Path) -> Iterator[Any]:
    with serving(plain_bundle, "--rows", 4, "--max-new-tokens", 16) as server:
        schema = server.ask("/openapi.json").json()
        for name in ("CompletionRequest", "ChatRequest"):  # or all it makes would be 404
            schema["components"]["schemas"][name]["properties"]["model"]["enum"] = ["tiny"]
        loaded = schemathesis.openapi.from_dict(schema)
        loaded.config.update(base_url=server.url)
        yield loaded
        assert server.ask("/health").status == 200
        assert server.metric("running_rows") == 0


requests = schemathesis.pytest.from_fixture("api")


@requests.parametrize()
@settings(
    max_examples=40, deadline=None, derandomize=True, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
def test_the_server_answers_as_its_schema_says(case: Any) -> None:
    case.call_and_validate(checks=CHECKS, timeout=60)
