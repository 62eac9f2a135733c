"""Whether the ranks of a model find room on the nodes of a cluster. A pure function; Ray itself would wait for ever."""

from collections.abc import Mapping, Sequence

Resources = Mapping[str, float]


def misfit(bundles: Sequence[Resources], nodes: Mapping[str, Resources]) -> str | None:
    """The first bundle for which no node has room beside those before it, and what is left there. None: all fit.

    bundles: one for each rank, largest first or all alike. nodes: resources by name of node. Each bundle is
    put where the least room would be left, as Ray packs.
    """
    free = {name: dict(resources) for name, resources in nodes.items()}
    for rank, bundle in enumerate(bundles):
        fitting = [name for name, left in free.items() if all(left.get(key, 0) >= need for key, need in bundle.items())]
        if not fitting:
            left = (
                "; ".join(f"{name} {_told(resources, bundle)}" for name, resources in free.items()) or "no node at all"
            )
            beside = f" beside the {rank} before it" if rank else ""
            return (
                f"bundle {rank} of {len(bundles)} ({_told(bundle, bundle)}) fits on no node{beside}. Left there: {left}"
            )
        tightest = min(fitting, key=lambda name: sum(free[name].get(key, 0) for key in bundle))
        for key, need in bundle.items():
            free[tightest][key] -= need
    return None


def _told(resources: Resources, keys: Resources) -> str:
    return ", ".join(f"{key} {resources.get(key, 0):g}" for key in keys)
