"""A running application as a soak sees it: which expert servers there are, and what its metrics say."""

import json
import re
import urllib.request
from dataclasses import dataclass
from typing import Any

SECONDS = 30.0
"""For an answer: replicas that are frozen or cut off are waited for."""


@dataclass(frozen=True)
class Server:
    """An expert server. id: as the directory and the metrics name it."""

    id: str
    pid: int
    host: str


class Target:
    """url: of the API. model: the one whose experts are on servers."""

    def __init__(self, url: str, model: str) -> None:
        self.url, self.model = url, model

    def servers(self) -> list[Server]:
        """Those that answer, by host and process."""
        told = [server for server in self._cluster()["experts"] if server["model"] == self.model]
        found = [Server(server["replica_id"], server["pid"], server["host"]) for server in told]
        return sorted(found, key=lambda server: (server.host, server.pid))

    def hosts_of_the_rest(self) -> set[str]:
        """Addresses of hosts with a front, an engine or one of its ranks."""
        cluster = self._cluster()
        ranks = [rank for engine in cluster["engines"] for rank in engine["ranks"]]
        return {process["host"] for process in [*cluster["fronts"], *cluster["engines"], *ranks]}

    def metrics(self, pattern: str) -> list[float]:
        """Values of the series whose line matches `pattern`."""
        return [float(line.rsplit(" ", 1)[1]) for line in self.lines() if re.match(pattern, line)]

    def failovers(self, server: Server) -> int:
        """Calls that it did not answer in time, or not at all, and that went to another copy."""
        return int(sum(self.metrics(f'moray:expert_failovers_total.*server="{server.id}"')))

    def num_servers(self) -> float:
        return next(iter(self.metrics("moray:expert_servers")), 0)

    def fewest_copies(self) -> float:
        """Of any expert; 0 while no directory answers."""
        return min(self.metrics("moray:expert_copies"), default=0)

    def copies_without(self, server: str) -> float:
        """The fewest copies of any expert in a table that no longer names `server`; 0 while there is none."""
        lines = self.lines()
        named = [line for line in lines if line.startswith("moray:experts_named{")]
        if not named or any(f'server="{server}"' in line for line in named):
            return 0
        return min(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("moray:expert_copies{"))

    def lines(self) -> list[str]:
        """Of the metrics."""
        return self._get("/metrics").splitlines()

    def _cluster(self) -> dict[str, Any]:
        return dict(json.loads(self._get("/cluster")))

    def _get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=SECONDS) as response:
            return str(response.read().decode())
