"""How many expert servers a deployment should have, by how busy they are: an autoscaling policy of Serve.

Rows go over sockets, so Serve sees no requests at expert servers, and its own policy would keep them at the fewest.
Serve's controller imports this module: it knows nothing of torch or of the rest of Moray.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

POLICY = "deployments.experts.autoscaling:ByBusyShare"
"""As a YAML names it."""
BUSY_SHARE = "busy_share"
"""The metric that servers tell: the part of the time, 0 to 1, in which the serving thread computed."""
TARGET_BUSY_SHARE = 0.5
"""By default: with more, many calls wait for others. One engine computes between its calls, and may never reach it."""


class BusyShare:
    """Of the time since it was asked last. busy_seconds: up to now."""

    def __init__(self, busy_seconds: Callable[[], float], clock: Callable[[], float] = time.monotonic) -> None:
        self._busy_seconds, self._clock = busy_seconds, clock
        self._asked, self._busy = clock(), busy_seconds()

    def __call__(self) -> float:
        asked, busy = self._clock(), self._busy_seconds()
        elapsed, computed = asked - self._asked, busy - self._busy
        self._asked, self._busy = asked, busy
        return min(computed / elapsed, 1.0) if elapsed > 0 else 0.0


class ByBusyShare:
    """The policy. Serve itself applies the bounds, delays and factors of `autoscaling_config`.

    options: `policy_kwargs` of the YAML. Faulty ones count for nothing here: what is raised in Serve's controller keeps
    it from deploying anything, and is told nowhere. The servers refuse them (`target_of`).
    """

    def __init__(self, **options: Any) -> None:
        try:
            self._target = target_of(options)
        except ValueError:
            self._target = TARGET_BUSY_SHARE

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """context: an AutoscalingContext. The number of servers that there should be, and a state that is empty."""
        told = (context.aggregated_metrics or {}).get(BUSY_SHARE, {})
        wanted = wanted_servers(
            list(told.values()), context.current_num_replicas, context.target_num_replicas, self._target
        )
        return wanted, {}


def target_of(options: Mapping[str, Any]) -> float:
    """Raises ValueError when `options` are not those of the policy."""
    if unknown := options.keys() - {"target_busy_share"}:
        raise ValueError(f"policy_kwargs has {', '.join(sorted(unknown))}; it may have target_busy_share")
    target = options.get("target_busy_share", TARGET_BUSY_SHARE)
    if not isinstance(target, int | float) or not 0 < target <= 1:
        raise ValueError(f"target_busy_share is {target!r}; it must be a number above 0, and at most 1")
    return target


def wanted_servers(shares: Sequence[float], running: int, wanted: int, target: float) -> int:
    """So many that each would be busy for `target` of the time, or `wanted`, as before, where that is not certain.

    shares: of those of the `running` servers that have told. The others may do nothing, as those do that have just
    started, or as much as these: the number changes when it should either way. At least one: of none nobody would tell.
    """
    if not shares:
        return wanted
    work = sum(shares) / target
    fewest, most = (max(1, math.ceil(servers - 1e-9)) for servers in (work, work * running / len(shares)))
    return min(max(wanted, fewest), most)
