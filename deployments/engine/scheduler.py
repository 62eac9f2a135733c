"""Which sequences compute how many tokens in the next step.

Everything reduces to {sequence: number of tokens}: a decode is one token, a prefill chunk
several, a preempted sequence a longer prompt. Knows blocks and counts, no tensors and no time.

Order is by arrival throughout: waiting sequences start in order, and when blocks run out
the latest arrival gives its own back and waits, to compute them again. So the oldest
running sequence always progresses, and overload only slows.
"""

from bisect import insort
from collections.abc import Iterable
from dataclasses import dataclass

from deployments.engine.blocks import BlockPool
from deployments.engine.kv_blocks import KVBlocks
from deployments.engine.request import EngineRequest, RequestTooLong
from deployments.engine.sequence import Sequence, Status
from model.kv_groups import BlockNeeds

PROMPT_LOGPROBS_CHUNK = 256
"""Most prompt tokens of one sequence in a step when each needs a row of logits: bounds their memory."""

RESUMED_FIRST = 2**62
"""Requests that another engine began have waited already: they arrive, in order, before all others."""

Plan = dict[Sequence, int]


@dataclass(frozen=True)
class Limits:
    """What a step, and what a sequence, may need. kv_chunks: as `BlockNeeds.chunks`."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    block_size: int
    enable_prefix_caching: bool = True
    kv_chunks: tuple[int | None, ...] = (None,)


@dataclass
class Counts:
    """What happened since the engine started, in tokens and sequences."""

    preemptions: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0


def _arrival(sequence: Sequence) -> int:
    return sequence.arrival


class Scheduler:
    """Continuous batching. One thread calls it."""

    def __init__(self, pool: BlockPool, limits: Limits) -> None:
        self.pool, self.limits, self.counts = pool, limits, Counts()
        self.kv = KVBlocks(pool, BlockNeeds(limits.kv_chunks, limits.block_size, limits.max_num_batched_tokens))
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self._arrivals, self._resumed_arrivals = 0, -RESUMED_FIRST
        # Every running sequence gets a token a step, so there can be no more than tokens.
        self.max_running = min(limits.max_num_seqs, limits.max_num_batched_tokens)
        self._slots = list(range(self.max_running))[::-1]

    def check(self, request: EngineRequest) -> None:
        """Raises RequestTooLong for a request that could never run to its end."""
        length, limits = len(request.prompt), self.limits
        if not 0 < length < limits.max_model_len:
            raise RequestTooLong(f"a prompt of {length} tokens is not in 1..{limits.max_model_len - 1} (max_model_len)")
        longest = min(length + request.sampling.max_tokens, limits.max_model_len)
        blocks = self.kv.needs.held(longest - 1)  # nothing attends to the last token
        if blocks > self.pool.num_blocks:
            raise RequestTooLong(
                f"{length} prompt and {request.sampling.max_tokens} output tokens need {blocks} KV blocks of "
                f"{limits.block_size}; there are {self.pool.num_blocks}: ask for less, or raise kv_cache_memory"
            )

    def add(self, request: EngineRequest) -> list[Sequence]:
        """Its choices, in the queue; all but the first start when the prompt is computed."""
        self.check(request)
        salt = b"" if self.limits.enable_prefix_caching else request.request_id.encode()
        arrival = self._arrival_of(request)
        outputs = request.outputs or ((),) * request.n
        choices = [
            Sequence(request, index, arrival + index, salt=salt, outputs=tokens)
            for index, tokens in enumerate(outputs)
            if tokens is not None
        ]
        choices[0].siblings = choices[1:]
        insort(self.waiting, choices[0], key=_arrival)
        return choices

    def schedule(self) -> Plan:
        """The next step; empty only when nothing is there to do."""
        plan: Plan = {}
        preempted = self.counts.preemptions
        budget = self._continue_running(plan)
        if self.counts.preemptions == preempted:
            self._start_waiting(plan, budget)
        return plan

    def computed(self, sequence: Sequence, count: int) -> None:
        """Says that a step computed `count` more tokens of `sequence`; call it before the new token is appended."""
        sequence.num_computed += count
        self.kv.computed(sequence)
        if sequence.siblings and sequence.num_computed >= sequence.num_prompt:
            for sibling in sequence.siblings:
                insort(self.waiting, sibling, key=_arrival)
            sequence.siblings = []

    def remove(self, sequences: Iterable[Sequence]) -> None:
        """Ends sequences, wherever they are, and frees their blocks."""
        for sequence in sequences:
            if sequence.status is Status.RUNNING:
                self.running.remove(sequence)
                self._release(sequence)
            elif sequence in self.waiting:
                self.waiting.remove(sequence)
            sequence.siblings = []
            sequence.status = Status.FINISHED

    def _arrival_of(self, request: EngineRequest) -> int:
        """Of its first choice."""
        if request.outputs:
            self._resumed_arrivals += request.n
            return self._resumed_arrivals - request.n
        self._arrivals += request.n
        return self._arrivals - request.n

    def _continue_running(self, plan: Plan) -> int:
        budget = self.limits.max_num_batched_tokens
        decoding = [sequence for sequence in self.running if sequence.num_pending == 1]
        prefilling = [sequence for sequence in self.running if sequence.num_pending > 1]
        for sequence in decoding + prefilling:
            if sequence.status is not Status.RUNNING:
                continue  # preempted for one before it
            count = self._chunk(sequence, budget)
            if not count:
                break
            refund = self._make_room(sequence, count, plan)
            if sequence.status is Status.RUNNING:
                plan[sequence] = count
                budget -= count
            budget += refund
        return budget

    def _chunk(self, sequence: Sequence, budget: int) -> int:
        limit = min(budget, PROMPT_LOGPROBS_CHUNK) if sequence.wants_prompt_logprobs else budget
        return min(sequence.num_pending, limit)

    def _make_room(self, sequence: Sequence, count: int, plan: Plan) -> int:
        """Blocks of `sequence` for `count` more tokens, else preempts it; returns the tokens taken back from `plan`."""
        missing = self.kv.missing(sequence, sequence.num_computed + count)
        if not missing:
            return 0
        refund = 0
        while missing > self.pool.num_free:
            victim = self.running[-1]
            refund += plan.pop(victim, 0)
            self._preempt(victim)
            if victim is sequence:
                return refund
        self.kv.grow(sequence, sequence.num_computed + count)
        return refund

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._release(sequence)
        sequence.status = Status.WAITING
        sequence.num_preemptions += 1
        self.counts.preemptions += 1
        insort(self.waiting, sequence, key=_arrival)

    def _release(self, sequence: Sequence) -> None:
        self.kv.release(sequence)
        self._slots.append(sequence.slot)
        sequence.slot = -1

    def _start_waiting(self, plan: Plan, budget: int) -> None:
        started = 0
        while started < len(self.waiting) and budget and self._slots:
            sequence = self.waiting[started]
            if not self._start(sequence):
                break
            started += 1
            plan[sequence] = count = self._chunk(sequence, budget)
            self.kv.grow(sequence, sequence.num_computed + count)
            budget -= count
        del self.waiting[:started]

    def _start(self, sequence: Sequence) -> bool:
        """Gives a sequence all the blocks that its tokens so far need, unless others would soon miss them."""
        if not self.kv.start(sequence, self.kv.reserve(self.running), is_known=not sequence.wants_prompt_logprobs):
            return False
        sequence.slot = self._slots.pop()
        sequence.status = Status.RUNNING
        insort(self.running, sequence, key=_arrival)
        if sequence.is_unstarted:
            self._count_cached(sequence)
        return True

    def _count_cached(self, sequence: Sequence) -> None:
        sequence.num_cached = min(sequence.num_computed, sequence.num_prompt)
        if self.limits.enable_prefix_caching:
            self.counts.prefix_queries += sequence.num_prompt
            self.counts.prefix_hits += sequence.num_cached
