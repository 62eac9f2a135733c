"""What an engine's call raises, in the terms of the front."""

from ray.serve.exceptions import BackPressureError

from deployments.engine.request import EngineStopping, ExpertsGone, FrontLost, QueueFull, RequestTooLong, StepFailed
from deployments.front.engine_client import EngineFailure, EngineUnavailable
from deployments.front.replay import EngineLeft, EngineLost

_OURS = (EngineStopping, ExpertsGone, FrontLost, QueueFull, RequestTooLong, StepFailed)


def cause_of(error: Exception) -> BaseException | None:
    """What the engine itself raised; None for what happened on the way.

    Serve's calls wrap it in an error that has a `cause`; those that it makes over gRPC
    (RAY_SERVE_THROUGHPUT_OPTIMIZED) raise it as it is.
    """
    return getattr(error, "cause", None) or (error if isinstance(error, _OURS) else None)


def told(error: Exception) -> str:
    """For people: what the engine itself raised, else what happened on the way."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return str(cause_of(error) or type(error).__name__)


def translated(error: Exception, model: str, engine: str) -> Exception:
    """QueueFull and RequestTooLong as they are; EngineLost if another engine may go on; EngineUnavailable if none
    can now; else EngineFailure.

    What is not the engine's (`cause_of`) happened on the way: actor died, connection broken, call cancelled,
    deployment unavailable.
    """
    cause = cause_of(error)
    if isinstance(cause, QueueFull | RequestTooLong):
        return cause
    if isinstance(error, BackPressureError):
        return QueueFull(0, 1.0)
    if isinstance(cause, ExpertsGone):
        return EngineUnavailable(f"Engine replica {engine}: {cause}")
    if isinstance(cause, EngineStopping):
        return EngineLeft(f"Engine replica {engine}: {cause}")
    if isinstance(cause, StepFailed | FrontLost):
        return EngineLost(f"Engine replica {engine}: {cause}")
    if cause is None:
        return EngineLost(f"Engine replica {engine} was lost ({type(error).__name__})")
    return EngineFailure(f"The engine of {model!r} failed: {type(cause).__name__}: {cause}")
