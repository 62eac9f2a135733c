"""Sends a call to the engine replica that the front chose. The choice itself is in placement.py."""

from ray.serve._private.common import ReplicaID
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from deployments.front.roster import Roster, roster_of


class EngineRouter(RequestRouter):
    """A call's `session_id` names its replica. It goes there or, when that is gone, nowhere: its caller has a
    deadline and knows better where to try next. Calls without one go to any replica.

    Serve repeats a call whose connection broke; a `generate` must not be, since the front goes on with the tokens
    that it has. So none goes to a suspect.
    """

    @property
    def _roster(self) -> Roster:
        return roster_of(self._deployment_id.name)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        if pending_request is None:
            return [candidate_replicas]
        pending_request.routing_context.should_backoff = True  # else Serve asks again without a pause
        call = pending_request.metadata
        if call.call_method == "generate" and call.session_id in self._roster.suspects:
            return []
        chosen = [replica for replica in candidate_replicas if call.session_id in ("", replica.replica_id.unique_id)]
        for replica in chosen:
            self._spare_probe(replica.replica_id)
        return [chosen] if chosen else []

    def _spare_probe(self, replica: ReplicaID) -> None:
        """Engines admit requests themselves, so their queues need not be asked for before each call."""
        if self.replica_queue_len_cache.get(replica) is None and replica.unique_id not in self._roster.suspects:
            self.replica_queue_len_cache.update(replica, 0)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        self._roster.update(replica.replica_id.unique_id for replica in replicas)

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        super().on_replica_actor_died(replica_id)
        self._roster.suspects[replica_id.unique_id] = "died"
        self._roster.update(replica.unique_id for replica in self.curr_replicas)

    def on_replica_actor_unavailable(self, replica_id: ReplicaID) -> None:
        super().on_replica_actor_unavailable(replica_id)
        self._roster.suspects[replica_id.unique_id] = "broke its connection"
