"""Generated requests, valid and not, after the server's own OpenAPI schema: no 5xx, ever."""

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import not_a_server_error


@pytest.fixture
def openapi_schema(stack: str) -> schemathesis.BaseSchema:
    return schemathesis.openapi.from_url(f"{stack}/openapi.json")


schema = schemathesis.pytest.from_fixture("openapi_schema")


@schema.parametrize()
@settings(
    max_examples=25,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_no_server_error(case: schemathesis.Case) -> None:
    if isinstance(case.body, dict) and case.body.get("max_tokens") is None:
        case.body["max_tokens"] = 2  # without a limit a valid request runs to the end of the context
    case.call_and_validate(checks=[not_a_server_error], timeout=60)
