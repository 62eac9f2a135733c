"""A real cluster of several hosts for tests, each in a network namespace, and applications on it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from cluster import network
from cluster.hosts import HostCluster
from deployments.serve_rest import ServeRest
from tests.stack import serve_yaml

START_SECONDS = 120.0

needs_hosts = pytest.mark.skipif(network.why_not() is not None, reason=str(network.why_not()))
"""Marks tests that run where network namespaces can be made."""


class HostStack:
    """An application on a `HostCluster`. url: of the API, on the head."""

    def __init__(self, cluster: HostCluster) -> None:
        self.cluster = cluster
        self.rest = ServeRest(cluster.dashboard, cluster.token)
        self.url = f"http://{cluster.head.address}:8000"

    def deploy(self, args: dict[str, Any], **deployments: dict[str, Any]) -> dict[str, Any]:
        """Serve's status when `args` run; `deployments` are options by name, "-" written "_"."""
        config = serve_yaml(args)
        [application] = config["applications"]
        named = {deployment["name"]: deployment for deployment in application["deployments"]}
        for name, options in deployments.items():
            full = name.replace("_", "-")
            named.setdefault(full, {"name": full}).update(options)
        application["deployments"] = list(named.values())
        return self.deploy_config(config)

    def deploy_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """Serve's status when a whole Serve configuration runs, open to the hosts' network."""
        config["http_options"] = {"host": "0.0.0.0", "port": 8000}
        self.rest.deploy(config)
        return self.rest.await_running(START_SECONDS)


@contextmanager
def host_stack(num_hosts: int = 4, num_cpus: int = 2) -> Iterator[HostStack]:
    """A cluster without an application; all is taken down on leaving."""
    with HostCluster(num_hosts, num_cpus) as cluster:
        cluster.await_dashboard()
        yield HostStack(cluster)
