"""Runs a function on real ranks: processes that the test starts, ends and may kill."""

import multiprocessing as mp
import pickle
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch

SECONDS = 120
_CONTEXT = mp.get_context("forkserver")  # imports torch once, not once a rank
_CONTEXT.set_forkserver_preload(["cluster.shard_group", "cluster.experts.client", "cluster.experts.membership"])


def _rank(connection: Connection, function: Callable[..., Any], arguments: Sequence[Any]) -> None:
    torch.set_num_threads(1)
    try:
        answer = (function(*arguments), None)
    except BaseException:
        answer = (None, traceback.format_exc())
    connection.send_bytes(pickle.dumps(answer))  # `send` would leave tensors behind, in memory of this process


class Ranks:
    """`function(rank, *arguments)` in a process for each of `ranks`."""

    def __init__(self, ranks: Sequence[int], function: Callable[..., Any], *arguments: Any) -> None:
        self.processes, self._pipes = [], []
        for rank in ranks:
            ours, theirs = _CONTEXT.Pipe()
            process = _CONTEXT.Process(target=_rank, args=(theirs, function, (rank, *arguments)), daemon=True)
            process.start()
            theirs.close()
            self.processes.append(process)
            self._pipes.append(ours)

    def results(self) -> list[Any]:
        """What the function returned on each rank; fails with the traceback of the one that raised."""
        results = [self.result(place) for place in range(len(self._pipes))]
        for process in self.processes:
            process.join(SECONDS)
        return results

    def result(self, place: int) -> Any:
        """What one of them returned."""
        assert self._pipes[place].poll(SECONDS), f"{self.processes[place]} did not finish"
        result, error = pickle.loads(self._pipes[place].recv_bytes())
        assert error is None, error
        return result

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def on_ranks(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `function(rank, *arguments)` returns on each of `size` ranks."""
    ranks = Ranks(range(size), function, *arguments)
    try:
        return ranks.results()
    finally:
        ranks.kill()
