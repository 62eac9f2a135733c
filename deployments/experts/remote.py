"""What an engine's ranks are told of expert servers: each makes a client of its own from it."""

from typing import Any

import ray

from cluster.experts.client import ExpertClient
from deployments.config import ExpertsConfig
from deployments.experts.directory import DirectoryHandle
from model.model import ExpertsOfLayer


class RemoteExperts:
    """Crosses to other processes without its client.

    client: of this process, once it has been called.
    """

    def __init__(self, directory: DirectoryHandle, config: ExpertsConfig) -> None:
        self._directory, self._config = directory, config
        self.client: ExpertClient | None = None

    def __call__(self) -> ExpertsOfLayer:
        """Returns when every expert has a server that answers; raises ExpertsNotReady."""
        config = self._config
        host = ray.util.get_node_ip_address()
        self.client = ExpertClient(self._directory, host, config.deadline_s, config.give_up_s)
        self.client.start()
        self.client.wait_until_ready(config.ready_timeout_s)
        return self.client.layer

    def __reduce__(self) -> tuple[Any, ...]:
        return RemoteExperts, (self._directory, self._config)
