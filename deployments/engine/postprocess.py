"""What a step's tokens mean: sequences grow or end, and their fronts get deltas."""

from collections import defaultdict
from dataclasses import dataclass, field

from cluster.channel import Address
from deployments.engine.batch import StepBatch
from deployments.engine.request import TokenDelta, TokenLogprobs
from deployments.engine.scheduler import Plan, Scheduler
from deployments.engine.sequence import Sequence
from model.sampling import RowLogprobs, SampledTokens


@dataclass
class Outputs:
    """deltas: by front. first: sequences with their first token. finished: sequences with their last."""

    deltas: dict[Address, list[TokenDelta]] = field(default_factory=lambda: defaultdict(list))
    first: list[Sequence] = field(default_factory=list)
    finished: list[Sequence] = field(default_factory=list)


def postprocess(scheduler: Scheduler, plan: Plan, step: StepBatch, sampled: SampledTokens) -> Outputs:
    """Takes the results of `step` into the sequences of `plan`."""
    for (sequence, _), found in zip(step.targets, sampled.targets, strict=True):
        sequence.prompt_logprobs.append(_logprobs(found))
    for sequence, count in plan.items():
        scheduler.computed(sequence, count)
    outputs = Outputs()
    logprobs = sampled.logprobs or [None] * len(step.sampled)
    for sequence, token, row in zip(step.sampled, sampled.tokens, logprobs, strict=True):
        sequence.append(token)
        reason = sequence.finish_reason(scheduler.limits.max_model_len)
        if not sequence.first_output:
            outputs.first.append(sequence)
        outputs.deltas[sequence.request.reply_to].append(_delta(sequence, token, row, reason))
        if reason is not None:
            outputs.finished.append(sequence)
    scheduler.remove(outputs.finished)
    return outputs


def _delta(sequence: Sequence, token: int, row: RowLogprobs | None, reason: str | None) -> TokenDelta:
    request_id, offset = sequence.request.request_id, sequence.num_outputs - 1
    logprobs = None if row is None else [_logprobs(row)]
    if sequence.first_output:
        return TokenDelta(request_id, sequence.index, offset, [token], logprobs, reason)
    asked = sequence.index == 0 and sequence.sampling.prompt_logprobs is not None and not sequence.is_resumed
    return TokenDelta(
        request_id, sequence.index, offset, [token], logprobs, reason, sequence.num_cached or 0,
        sequence.prompt_logprobs if asked else None,
    )  # fmt: skip


def _logprobs(row: RowLogprobs) -> TokenLogprobs:
    return TokenLogprobs(row.token, row.logprob, row.rank, row.top)
