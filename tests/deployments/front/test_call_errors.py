"""What an engine's call raises, wrapped as Ray's own calls do it, and bare as Serve's calls over gRPC do it."""

from collections.abc import Callable

import pytest
from ray.exceptions import RayTaskError

from deployments.engine.request import EngineStopping, ExpertsGone, FrontLost, QueueFull, RequestTooLong, StepFailed
from deployments.front.call_errors import translated
from deployments.front.engine_client import EngineUnavailable
from deployments.front.replay import EngineLeft, EngineLost


def wrapped(cause: Exception) -> Exception:
    return RayTaskError("generate", "traceback", cause).as_instanceof_cause()


def bare(cause: Exception) -> Exception:
    return cause


@pytest.mark.parametrize("raised", [wrapped, bare])
@pytest.mark.parametrize(
    ("cause", "kind"),
    [
        (QueueFull(3, 1.0), QueueFull),
        (RequestTooLong("too long"), RequestTooLong),
        (ExpertsGone("experts [3] of layer 1"), EngineUnavailable),
        (EngineStopping("it stops"), EngineLeft),
        (StepFailed("bad luck"), EngineLost),
        (FrontLost("no connection"), EngineLost),
    ],
)
def test_what_the_engine_raised_is_known_either_way(
    raised: Callable[[Exception], Exception], cause: Exception, kind: type
) -> None:
    """Bare, experts that were gone counted as four lost engines, and the request as the one that killed them."""
    assert type(translated(raised(cause), "m", "e")) is kind


def test_what_happened_on_the_way_is_a_lost_engine() -> None:
    assert type(translated(ConnectionError(), "m", "e")) is EngineLost
