"""Serve's REST interface, which `serve deploy` and `serve status` talk to: deploys a YAML, waits until it runs."""

import json
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any

PATH = "/api/serve/applications/"
POLL_SECONDS = 0.2
REQUEST_SECONDS = 60.0
"""The first deployment starts Serve's controller before it is answered."""


class DeployFailed(Exception):
    """The message has what Serve says."""


@dataclass(frozen=True)
class ServeRest:
    """address: of the head's dashboard, "http://host:8265". token: of a cluster with RAY_AUTH_MODE=token."""

    address: str
    token: str | None = None

    def deploy(self, config: dict[str, Any]) -> None:
        """Applies a Serve YAML, in place where it runs already. Raises DeployFailed, OSError if nobody answers."""
        self._call("PUT", json.dumps(config).encode())

    def status(self) -> dict[str, Any]:
        """`applications`, by name, with their deployments, replicas and where they are; `proxies`, by node."""
        answer: dict[str, Any] = json.loads(self._call("GET"))
        return answer

    def await_running(self, seconds: float) -> dict[str, Any]:
        """The status when every application runs as asked. Raises DeployFailed when one fails, or after `seconds`."""
        deadline = time.monotonic() + seconds
        while True:
            status = self.status()
            applications = status["applications"]
            if applications and all(_is_settled(application) for application in applications.values()):
                return status
            failed = [name for name, application in applications.items() if application["status"] == "DEPLOY_FAILED"]
            if failed or time.monotonic() > deadline:
                reason = "failed" if failed else f"does not run after {seconds:.0f} s"
                raise DeployFailed(f"{', '.join(failed or applications)} {reason}: {_messages(applications)}")
            time.sleep(POLL_SECONDS)

    def _call(self, method: str, body: bytes | None = None) -> bytes:
        headers = {"Content-Type": "application/json"}
        if self.token:
            headers["Authorization"] = f"Bearer {self.token}"
        request = urllib.request.Request(self.address + PATH, body, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=REQUEST_SECONDS) as response:
                return bytes(response.read())
        except urllib.error.HTTPError as error:
            raise DeployFailed(f"{method} {self.address}{PATH}: {error.code} {error.read().decode()}") from None


def replicas(status: dict[str, Any]) -> list[tuple[str, str]]:
    """Deployment and host of every running replica."""
    return sorted(
        (name, replica["node_ip"])
        for application in status["applications"].values()
        for name, deployment in application["deployments"].items()
        for replica in deployment["replicas"]
        if replica["state"] == "RUNNING"
    )


def _is_settled(application: dict[str, Any]) -> bool:
    healthy = all(deployment["status"] == "HEALTHY" for deployment in application["deployments"].values())
    return bool(application["status"] == "RUNNING" and healthy)


def _messages(applications: dict[str, Any]) -> str:
    said = [application["message"] for application in applications.values()]
    said += [
        deployment["message"]
        for application in applications.values()
        for deployment in application["deployments"].values()
    ]
    return "; ".join(dict.fromkeys(message for message in said if message)) or "Serve gives no reason"
