"""Brings a Serve YAML up on a local cluster, telling each step, and watches it.

What a newcomer would wait for in vain is found before anything starts: a faulty YAML, too
few CPUs, a port that is taken.
"""

import os
import shutil
import socket
import threading
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import yaml

from cluster import serve_settings
from cluster.local import LOOPBACK, LocalCluster, new_directory, prepare

START_SECONDS = 300.0
POLL_SECONDS, PHASES_SECONDS = 0.1, 0.5
WATCH_SECONDS = 1.0
DASHBOARD_PORT = 8265
HAPROXY_PORTS = {"RAY_SERVE_HAPROXY_METRICS_PORT": 9101, "RAY_SERVE_HAPROXY_STATS_PORT": 8404}


class LaunchFailed(Exception):
    """The message names the cause and, where there is one, the remedy."""


class Launch:
    """One run. The constructor only checks; `start` starts; `stop` ends every process, whatever had started."""

    def __init__(self, path: Path) -> None:
        self._begin = time.monotonic()
        self._say(f"Reading {path}")
        text = yaml.safe_load(path.read_text())
        self.directory = new_directory()
        self._cluster: LocalCluster | None = None
        try:
            self._prepare(text)
        except BaseException:
            shutil.rmtree(self.directory, ignore_errors=True)
            raise

    def _prepare(self, text: Any) -> None:
        prepare(self.directory)
        os.environ.update({key: value for key, value in self._environment().items() if key not in os.environ})
        from ray.serve.schema import ServeDeploySchema  # reads that environment when imported

        self._config = ServeDeploySchema.model_validate(text)
        self._client: Any = None
        self._check()

    @property
    def url(self) -> str:
        host = self._config.http_options.host or LOOPBACK
        return f"http://{LOOPBACK if host in ('0.0.0.0', '::') else host}:{self._config.http_options.port}"

    def start(self) -> None:
        """Returns when the application answers. Raises LaunchFailed."""
        self._say("Starting Ray on this machine")
        self._cluster = LocalCluster(self.directory)
        self._cluster.connect()
        self._say("Starting Ray Serve")
        self._start_serve()
        self._say("Loading the model")
        self._await_running()
        self._await_answer()
        dashboard = _free_port(DASHBOARD_PORT)
        self._cluster.start_dashboard(dashboard)
        self._tell_how_to_use(dashboard)

    def wait(self) -> None:
        """Returns never; raises LaunchFailed when the cluster has died."""
        while self._cluster and self._cluster.is_alive():
            time.sleep(WATCH_SECONDS)
        raise LaunchFailed("Ray has died")

    def stop(self) -> None:
        if self._cluster:
            self._say("Stopping")
            self._cluster.stop()
        shutil.rmtree(self.directory, ignore_errors=True)

    def _check(self) -> None:
        from ray._private.utils import get_num_cpus

        from deployments import config, demand

        for application in self._config.applications:
            if application.import_path == demand.OURS:
                config.read(application.args)
        memory = psutil.virtual_memory().available
        try:
            demand.check(self._config, {"CPU": get_num_cpus(), "memory": memory})
        except demand.DoesNotFit as error:
            raise LaunchFailed(str(error)) from None
        self._check_port(self._config.http_options.host or LOOPBACK, self._config.http_options.port)

    def _check_port(self, host: str, port: int) -> None:
        if not _is_free(host, port):
            raise LaunchFailed(
                f"port {port} of {host} is taken{_holder(port)}. End that, or set http_options.port in the YAML"
            )

    def _environment(self) -> dict[str, str]:
        """Serve's settings, each unless the caller's environment has it."""
        files = self.directory / "haproxy"
        files.mkdir()
        return {
            **serve_settings.SETTINGS,
            **serve_settings.haproxy_files(files),
            "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(_free_port(8500)),
            **{name: str(_free_port(port)) for name, port in HAPROXY_PORTS.items()},
        }

    def _start_serve(self) -> None:
        """Deploys as soon as the controller is there, while the proxies still start."""
        import ray
        from ray import serve

        options = self._config.http_options.model_dump()
        failures: list[BaseException] = []

        def start() -> None:
            try:
                serve.start(http_options=options, proxy_location=self._config.proxy_location)
            except BaseException as error:
                failures.append(error)

        starting = threading.Thread(target=start, daemon=True)
        starting.start()
        controller = None
        while controller is None:
            if failures:
                raise LaunchFailed(f"Ray Serve does not start: {failures[0]}")
            try:
                controller = ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
            except ValueError:
                time.sleep(POLL_SECONDS)
        ray.get(controller.apply_config.remote(self._config))
        starting.join()
        if failures:
            raise LaunchFailed(f"Ray Serve does not start: {failures[0]}")

    def _await_running(self) -> None:
        from ray import serve

        from cluster.starting import phases

        told: dict[str, str] = {}
        deadline, look = time.monotonic() + START_SECONDS, 0.0
        while time.monotonic() < deadline:
            if time.monotonic() >= look:
                look = time.monotonic() + PHASES_SECONDS
                self._tell_changes({phase.process: phase.phase for phase in phases()}, told)
            applications = serve.status().applications
            for name, application in applications.items():
                if application.status in ("DEPLOY_FAILED", "UNHEALTHY"):
                    raise LaunchFailed(f"application {name}: {_reason(application)}")
                self._tell_changes(_states(application.deployments), told)
            if applications and all(application.status == "RUNNING" for application in applications.values()):
                return
            time.sleep(POLL_SECONDS)
        raise LaunchFailed(f"not ready after {START_SECONDS:.0f} s; logs are in {self.directory}/session_latest/logs")

    def _tell_changes(self, states: Mapping[str, str], told: dict[str, str]) -> None:
        for name, state in states.items():
            if told.get(name) != state:
                told[name] = state
                self._say(f"  {name}: {state}")

    def _await_answer(self) -> None:
        """HAProxy sends requests on only after its own check of a replica."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"{self.url}/-/healthz", timeout=2):
                    return
            except OSError:
                time.sleep(POLL_SECONDS)
        raise LaunchFailed(f"{self.url} does not answer")

    def _tell_how_to_use(self, dashboard: int) -> None:
        models = [
            model["id"] for application in self._config.applications for model in application.args.get("models", ())
        ]
        self._say(f"Ready. Models: {', '.join(models) or 'none'}. API: {self.url}/v1 (documentation: {self.url}/docs)")
        if models:
            print(f"To change it in place: RAY_AUTH_MODE=token serve deploy -a http://{LOOPBACK}:{dashboard} FILE.yaml")
            print("Ctrl-C, or `make stop` in another shell, ends it. Try:")
            message = '{"role": "user", "content": "Name three oceans."}'
            body = f'{{"model": "{models[0]}", "max_tokens": 100, "messages": [{message}]}}'
            print(f"curl {self.url}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'", flush=True)

    def _say(self, message: str) -> None:
        print(f"[{time.monotonic() - self._begin:5.1f} s] {message}", flush=True)


def _states(deployments: Any) -> dict[str, str]:
    return {name: "ready" if deployment.status == "HEALTHY" else "starting" for name, deployment in deployments.items()}


def _reason(application: Any) -> str:
    messages = [deployment.message for deployment in application.deployments.values() if deployment.message]
    return "\n".join([application.message, *messages]).strip() or str(application.status)


def _is_free(host: str, port: int) -> bool:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def _free_port(preferred: int) -> int:
    """`preferred` if no one has it on loopback, else any free one."""
    if _is_free(LOOPBACK, preferred):
        return preferred
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def _holder(port: int) -> str:
    for connection in psutil.net_connections("tcp"):
        listens = connection.status == psutil.CONN_LISTEN and connection.laddr[1:] == (port,)
        if listens and connection.pid:
            return f" by {psutil.Process(connection.pid).name()} (pid {connection.pid})"
    return ""
