"""Which engine replicas there are, as Serve's routers in this process tell.

Serve makes a deployment's router inside the process that calls it, from a copy of the router's whole module, and
gives no way to hand it anything. So what a front must learn from it stands here: functions of other modules are
not copied.
"""

from collections import defaultdict
from collections.abc import Iterable


class Roster:
    """The replicas of one deployment as its router sees them, by Serve's ids. Safe to read from any thread.

    replicas: those that take new requests. suspects: those, among them or not, that were found dead or silent,
    and how it shows; liveness.py takes out again what proves alive.
    """

    def __init__(self) -> None:
        self.replicas: tuple[str, ...] = ()
        self.suspects: dict[str, str] = {}

    @property
    def trusted(self) -> list[str]:
        return [replica for replica in self.replicas if replica not in self.suspects]

    def update(self, replicas: Iterable[str]) -> None:
        self.replicas = tuple(replicas)


_rosters: defaultdict[str, Roster] = defaultdict(Roster)


def roster_of(deployment: str) -> Roster:
    """The one roster of that deployment in this process."""
    return _rosters[deployment]
