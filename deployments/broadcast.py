"""Asks every replica of a deployment the same question."""

import asyncio
from contextlib import suppress
from typing import Any

from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

ANSWER_SECONDS = 5.0


async def ask_all(handle: DeploymentHandle, method: str, timeout_s: float = ANSWER_SECONDS) -> list[Any]:
    """One entry for each replica that Serve counts as running: what `method` answered, or the exception.

    Replicas are waited for one by one, so that one that is frozen costs no other's answer;
    Serve's own `results_async` would give up on all of them.
    """
    asked: list[Any] = []
    with suppress(DeploymentUnavailableError, TimeoutError):
        async with asyncio.timeout(timeout_s):
            asked = await handle.broadcast(method)._fetch_replica_results_async()
    answers = (asyncio.wait_for(result.get_async(), timeout_s) for result in asked)
    return await asyncio.gather(*answers, return_exceptions=True)
