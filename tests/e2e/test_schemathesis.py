"""Generated requests, valid and not, after the server's own OpenAPI schema: no 5xx, ever."""

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error

SETTINGS = settings(
    max_examples=25,
    deadline=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def test_no_server_error(stack: str) -> None:
    schema = schemathesis.openapi.from_url(f"{stack}/openapi.json")
    for found in schema.get_all_operations():
        SETTINGS(given(case=found.ok().as_strategy())(_call))()


def _call(case: schemathesis.Case) -> None:
    if isinstance(case.body, dict) and case.body.get("max_tokens") is None:
        case.body["max_tokens"] = 2  # without a limit a valid request runs to the end of the context
    case.call_and_validate(checks=[not_a_server_error], timeout=60)
