"""A scheduler that is stepped by hand, without threads."""

import pytest

from deployments.engine.batch import BatchBuilder
from deployments.engine.blocks import BlockPool
from deployments.engine.loop import Executor
from deployments.engine.postprocess import postprocess
from deployments.engine.scheduler import Limits, Plan, Scheduler
from deployments.engine.sequence import Status


class Bench:
    """A scheduler, its batches and an executor that has `num_blocks`, stepped by hand; checks what always holds."""

    def __init__(self, executor: Executor, **limits: object) -> None:
        values = {"max_num_seqs": 8, "max_num_batched_tokens": 16, "max_model_len": 200, "block_size": 4, **limits}
        self.limits = Limits(**values)
        self.pool = BlockPool(executor.num_blocks)
        self.scheduler = Scheduler(self.pool, self.limits)
        self.batches = BatchBuilder(self.limits)
        self.executor = executor
        self.outputs: dict[tuple[str, int], list[int]] = {}
        self.reasons: dict[tuple[str, int], str] = {}
        self.cached: dict[tuple[str, int], int] = {}

    def step(self) -> Plan:
        plan = self.scheduler.schedule()
        self._check(plan)
        if plan:
            batch = self.batches.build(plan)
            outputs = postprocess(self.scheduler, plan, batch, self.executor.step(batch.paged, batch.sampling))
            for delta in (delta for deltas in outputs.deltas.values() for delta in deltas):
                key = (delta.request_id, delta.index)
                assert delta.offset == len(self.outputs.setdefault(key, []))
                self.outputs[key] += delta.token_ids
                self.cached.setdefault(key, delta.num_cached_tokens)
                if delta.finish_reason is not None:
                    assert key not in self.reasons
                    self.reasons[key] = delta.finish_reason
            for sequence in outputs.first:
                sequence.first_output = 1.0
        return plan

    def run(self, most: int = 5000) -> None:
        for _ in range(most):
            if not self.step():
                assert not self.scheduler.waiting
                assert not self.scheduler.running
                assert self.pool.leaks() == []
                return
        pytest.fail("the scheduler does not come to an end")

    def _check(self, plan: Plan) -> None:
        scheduler, running = self.scheduler, self.scheduler.running
        assert sum(plan.values()) <= self.limits.max_num_batched_tokens
        assert len(running) <= self.limits.max_num_seqs
        assert all(count > 0 and s.status is Status.RUNNING for s, count in plan.items())
        assert [s.arrival for s in running] == sorted(s.arrival for s in running)
        assert [s.arrival for s in scheduler.waiting] == sorted(s.arrival for s in scheduler.waiting)
        if running:
            assert running[0] in plan, "the oldest must progress"
            assert all(s in plan for s in running if s.num_pending == 1), "every decode must progress"
        held = [block for s in running for blocks in scheduler.kv.held(s) for block in blocks]
        for block in range(self.pool.num_blocks):
            assert self.pool.num_references(block) == held.count(block)
        for s, count in plan.items():
            assert sum(map(len, scheduler.kv.held(s))) <= scheduler.kv.needs.held(len(s.tokens))
            assert all(len(blocks) * self.limits.block_size >= s.num_computed + count for blocks in s.blocks)
