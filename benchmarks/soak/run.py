"""One soak: what the machine can do, then 70% of that undisturbed, then the same while servers are disturbed."""

import asyncio
from typing import Any

from benchmarks.soak.disturbances import Disturbances
from benchmarks.soak.load import Answers, load, prompts_of
from benchmarks.soak.target import Target

WARM_SECONDS, FULL_SECONDS = 6.0, 12.0
NUM_PROMPTS = 48


async def soak(
    target: Target, disturbances: Disturbances, calm_seconds: float, num_prompts: int = NUM_PROMPTS
) -> dict[str, Any]:
    """The report. Every answer must be complete, and token for token what it was undisturbed.

    calm_seconds: at least so long undisturbed, and until every prompt has been answered once.
    """
    prompts = prompts_of(target.model, num_prompts)
    await load(target.url, target.model, prompts, 16, 0, WARM_SECONDS)
    full = await load(target.url, target.model, prompts, 32, 0, FULL_SECONDS)
    rate = 0.7 * full.num_answers / full.seconds
    all_of_them = 1.05 * num_prompts / rate
    calm = await load(target.url, target.model, prompts, 64, rate, max(calm_seconds, all_of_them))
    disturbing = asyncio.create_task(asyncio.to_thread(disturbances.run, target))
    rough = await load(target.url, target.model, prompts, 64, rate, disturbances.seconds)
    await disturbing
    expected = full.tokens | calm.tokens
    return {
        "requests": rough.num_answers + len(rough.lost),
        "tokens": rough.num_tokens,
        "lost": len(rough.lost),
        "first_lost": rough.lost[:1],
        "changed": sum(tokens != expected.get(prompt, tokens) for prompt, tokens in rough.tokens.items()),
        "compared": len(rough.tokens.keys() & expected.keys()),
        "several_answers": sum(len(tokens) > 1 for tokens in rough.tokens.values()),
        "requests_per_second": round(rate, 2),
        "calm_p99_ms": round(1000 * calm.percentile(0.99)),
        "calm_longest_ms": round(1000 * calm.longest()),
        "p99_ms": round(1000 * rough.percentile(0.99)),
        "longest_ms": round(1000 * rough.longest()),
        "longest": _longest(rough, disturbances),
        "failovers": sum(target.metrics("moray:expert_failovers_total")),
        "waits": sum(target.metrics("moray:expert_waits_total")),
        "disturbed": [f"{kind} on {server.host}" for kind, server, _ in disturbances.happened],
        "failovers_of_disturbed": disturbances.failovers,
        "restored_s": [round(seconds, 1) for seconds in disturbances.restored],
    }


def _longest(answers: Answers, disturbances: Disturbances, count: int = 6) -> list[str]:
    """The longest pauses, each once though many streams had it, and what they followed."""
    told: list[str] = []
    ends: list[float] = []
    for end, seconds in sorted(answers.gaps, key=lambda gap: -gap[1]):
        if all(abs(end - other) > 1.0 for other in ends):
            ends.append(end)
            told.append(f"{1000 * seconds:.0f} ms until {disturbances.after(end)}")
        if len(told) == count:
            break
    return told
