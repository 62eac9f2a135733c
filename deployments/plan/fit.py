"""What does not fit, and the nearest change that would. Pure: decided from sizes alone."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from deployments.plan.needs import ExpertNeeds, Layout, Model, ModelNeeds, RankNeeds, kv_blocks
from model.checkpoint.slices import possible_world_sizes

MOST_STAGES = 16
"""Remedies propose no more pipeline stages than this."""


@dataclass(frozen=True)
class Fault:
    """what: who does not fit where, in bytes people can read. remedy: the nearest that would do."""

    what: str
    remedy: str


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank, and of an expert server; None where nothing tells. headroom: the share left to all else."""

    rank: int | None
    server: int | None
    headroom: float

    def room(self, memory: int | None) -> int | None:
        return None if memory is None else int(memory * (1 - self.headroom))


def readable(size: float) -> str:
    """In KiB, MiB or GiB, rounded towards zero, so that what is said to fit does."""
    units = ((2**30, "GiB"), (2**20, "MiB"))
    unit, name = next(((unit, name) for unit, name in units if abs(size) >= unit), (2**10, "KiB"))
    return f"{int(100 * size / unit) / 100:,.2f} {name}"


def check(model: Model, layout: Layout, memory: Memory) -> tuple[ModelNeeds | None, list[Fault]]:
    """The needs of `layout`, None if the model cannot be cut that way, and everything that does not fit."""
    if layout.pipeline_parallel_size > model.args.n_layers:
        what = f"pipeline_parallel_size {layout.pipeline_parallel_size} is above the {model.args.n_layers} layers"
        return None, [Fault(what, f"set pipeline_parallel_size to at most {model.args.n_layers}")]
    undivided = _undivided(model, layout)
    if undivided is not None:
        return None, [undivided]
    needs = model.needs(layout)
    return needs, [*_rank_faults(model, layout, needs, memory), *_expert_faults(needs.experts, memory)]


def _undivided(model: Model, layout: Layout) -> Fault | None:
    possible, size = possible_world_sizes(model.args), layout.tensor_parallel_size
    if size in possible:
        return None
    nearest = min(possible, key=lambda other: (abs(other - size), -other))
    what = f"tensor_parallel_size {size} does not divide the model (these do: {', '.join(map(str, possible))})"
    return Fault(what, f"set tensor_parallel_size to {nearest}")


def _rank_faults(model: Model, layout: Layout, needs: ModelNeeds, memory: Memory) -> Iterator[Fault]:
    room = memory.room(memory.rank)
    for rank in needs.ranks if room is not None else ():
        wanted = rank.fixed + _kv_of(rank, needs, model)
        if room is not None and wanted > room:
            what = (
                f"a rank of stage {rank.stage} needs {readable(wanted)} (weights {readable(rank.weights)}, "
                f"rotary tables {readable(rank.rotary)}, keys and values {readable(wanted - rank.fixed)}) "
                f"and may fill {readable(room)} of {readable(memory.rank or 0)}"
            )
            yield Fault(what, _rank_remedy(model, layout, needs, room))
            return
    blocks = kv_blocks(needs, model.engine, room)
    if blocks is not None and blocks < needs.blocks_per_sequence:
        tokens = needs.blocks.longest(blocks) or 0
        yield Fault(
            f"keys and values of {tokens:,} tokens fit, fewer than max_model_len ({needs.max_model_len:,})",
            f"set max_model_len to at most {tokens:,}, or kv_cache_memory to "
            f"{needs.kv_per_block * needs.blocks_per_sequence}",
        )


def _kv_of(rank: RankNeeds, needs: ModelNeeds, model: Model) -> int:
    """Bytes of what the YAML asks for; where it leaves that open, of one sequence of full length."""
    blocks = kv_blocks(needs, model.engine, None)
    return rank.kv_per_block * (needs.blocks_per_sequence if blocks is None else blocks)


def _rank_remedy(model: Model, layout: Layout, needs: ModelNeeds, room: int) -> str:
    """The smallest change first: fewer keys and values, more ranks, experts elsewhere, shorter sequences."""
    held = min((room - rank.fixed) // rank.kv_per_block for rank in needs.ranks)
    if model.engine.kv_cache_memory is not None and held >= needs.blocks_per_sequence:
        return f"set kv_cache_memory to at most {readable(held * needs.kv_per_block)}"
    wider = next((other for other in _wider(model, layout) if _fits(model, other, room)), None)
    if wider is not None:
        return (
            f"set tensor_parallel_size to {wider.tensor_parallel_size} and pipeline_parallel_size to "
            f"{wider.pipeline_parallel_size}"
        )
    if model.args.moe_args is not None and layout.servers is None:
        return "put the routed experts on servers: `experts:` of the model, num_replicas of the deployment experts-<id>"
    if held > 0 and (longest := needs.blocks.longest(held)):
        return f"set max_model_len to at most {longest:,}"
    return "give ranks more memory: no tensor- and pipeline-parallel size makes this fit"


def _wider(model: Model, layout: Layout) -> list[Layout]:
    """Layouts of more ranks, the fewest first; of as many ranks, the fewest stages first."""
    now = layout.tensor_parallel_size * layout.pipeline_parallel_size
    others = [
        replace(layout, tensor_parallel_size=tensor, pipeline_parallel_size=pipeline)
        for tensor in possible_world_sizes(model.args)
        for pipeline in range(1, min(MOST_STAGES, model.args.n_layers) + 1)
        if tensor * pipeline > now
    ]
    return sorted(others, key=lambda o: (o.tensor_parallel_size * o.pipeline_parallel_size, o.pipeline_parallel_size))


def _fits(model: Model, layout: Layout, room: int) -> bool:
    needs = model.needs(layout)
    blocks = kv_blocks(needs, model.engine, room)
    enough = blocks is None or blocks >= needs.blocks_per_sequence
    return enough and all(rank.fixed + _kv_of(rank, needs, model) <= room for rank in needs.ranks)


def _expert_faults(experts: ExpertNeeds | None, memory: Memory) -> Iterator[Fault]:
    if experts is None:
        return
    if experts.copies > experts.servers:
        yield Fault(
            f"{experts.copies} copies of every expert need as many servers, there are {experts.servers}",
            f"set num_replicas of the experts to at least {experts.copies}, or copies to {experts.servers}",
        )
    if experts.memory is not None and experts.most < experts.least:
        yield Fault(
            f"experts.memory of {readable(experts.memory)} holds {experts.most} experts; {experts.copies} copies of "
            f"all need room for {experts.least} on each of {experts.servers} servers",
            f"set experts.memory to at least {readable(experts.least * experts.each)}, or num_replicas of the experts "
            f"to {_servers_for(experts, experts.memory)}",
        )
    room = memory.room(memory.server)
    if room is None or experts.most_bytes <= room:
        return
    what = (
        f"an expert server takes {readable(experts.most_bytes)} ({experts.most} experts of {readable(experts.each)}) "
        f"and may fill {readable(room)} of {readable(memory.server or 0)}"
    )
    if experts.least * experts.each <= room:
        yield Fault(what, f"set experts.memory to at most {readable(room)}")
    elif (servers := _servers_for(experts, room)) is None:
        yield Fault(what, "give expert servers more memory: not one expert of each layer fits")
    else:
        yield Fault(what, f"set num_replicas of the experts to {servers}")


def _servers_for(experts: ExpertNeeds, room: int) -> int | None:
    """The fewest servers on which all copies fit in `room` bytes each, with what is spare; None if none do."""
    for servers in range(experts.copies, experts.copies * experts.per_layer + 1):
        wider = replace(experts, servers=servers, memory=None)
        if wider.most_bytes <= room:
            return servers
    return None
