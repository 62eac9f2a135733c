"""Four hosts on this machine, a model on them, a chat, and the death of a host: `make cluster-demo`.

python examples/ray-cluster/demo.py [CONFIG.yaml]
"""

import json
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import yaml

from cluster.hosts import HostCluster, HostsFailed
from cluster.network import NetworkUnavailable
from deployments.serve_rest import DeployFailed, ServeRest, replicas

CONFIG = Path(__file__).parents[2] / "configs/smollm2-hosts.yaml"
NUM_HOSTS = 4
START_SECONDS = 180.0
ANSWER_SECONDS = 60.0


def main() -> int:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else CONFIG
    config = yaml.safe_load(path.read_text())
    config["http_options"]["host"] = "0.0.0.0"  # of each host's own network, which only this machine reaches
    begin = time.monotonic()

    def say(message: str) -> None:
        print(f"[{time.monotonic() - begin:5.1f} s] {message}", flush=True)

    try:
        with HostCluster(NUM_HOSTS) as cluster:
            say(f"{NUM_HOSTS} hosts: {', '.join(host.address for host in cluster.hosts)}")
            rest = ServeRest(cluster.dashboard, cluster.token)
            cluster.await_dashboard()
            say(f"deploying {path}")
            rest.deploy(config)
            for name, host in replicas(rest.await_running(START_SECONDS)):
                say(f"  {name} on {host}")
            show(f"http://{cluster.head.address}:{config['http_options']['port']}", say)
            say("taking it all down")
        say("done")
        return 0
    except (NetworkUnavailable, HostsFailed, DeployFailed, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def show(url: str, say: Any) -> None:
    """Sends a chat, and shows `GET /cluster`."""
    model = json.loads(ask(f"{url}/v1/models"))["data"][0]["id"]
    question = "What is the capital of France?"
    body = {"model": model, "messages": [{"role": "user", "content": question}], "max_tokens": 24, "temperature": 0}
    answer = json.loads(ask(f"{url}/v1/chat/completions", body))
    say(f"{model} at {url}: {question} {answer['choices'][0]['message']['content']}")
    try:
        say(f"GET /cluster: {json.dumps(json.loads(ask(f'{url}/cluster')), indent=2)}")
    except urllib.error.HTTPError as error:
        say(f"GET /cluster: {error.code}")


def ask(url: str, body: dict[str, Any] | None = None) -> bytes:
    """The answer; waits until the ingress has found the replicas."""
    data = None if body is None else json.dumps(body).encode()
    deadline = time.monotonic() + ANSWER_SECONDS
    while True:
        try:
            request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as response:
                return bytes(response.read())
        except OSError as error:
            late = time.monotonic() > deadline
            if late or (isinstance(error, urllib.error.HTTPError) and error.code not in (502, 503)):
                raise
            time.sleep(0.2)


if __name__ == "__main__":
    sys.exit(main())
