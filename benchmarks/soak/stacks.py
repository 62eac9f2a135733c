"""What a soak serves: on this host as `make serve` does it, or on hosts in network namespaces."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from tests.hosts import HostStack, host_stack
from tests.stack import ROOT, Stack, free_port

MODEL = "smollm2-moe"
ONE_HOST = ROOT / "configs/smollm2-moe.yaml"
HOSTS = ROOT / "configs/smollm2-moe-hosts.yaml"


def serve_config(path: Path = ONE_HOST, **experts: object) -> dict[str, Any]:
    """The YAML's, on a free port. experts: changes of its expert deployment."""
    config = yaml.safe_load(path.read_text())
    config["http_options"]["port"] = free_port()
    for deployment in config["applications"][0]["deployments"]:
        if deployment["name"].startswith("experts-"):
            deployment.update(experts)
    return dict(config)


@contextmanager
def on_this_host(folder: Path) -> Iterator[Stack]:
    stack = Stack(folder, serve_config())
    stack.start()
    try:
        yield stack
    finally:
        stack.stop()


@contextmanager
def on_hosts(num_hosts: int = 4) -> Iterator[HostStack]:
    with host_stack(num_hosts) as stack:
        stack.deploy_config(yaml.safe_load(HOSTS.read_text()))
        yield stack
