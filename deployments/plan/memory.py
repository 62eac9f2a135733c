"""How much memory one replica or rank has, as far as its YAML tells."""

from typing import Any

GB = 10**9

GPU_BYTES = {
    "T4": 16 * GB,
    "V100": 16 * GB,
    "P100": 16 * GB,
    "L4": 24 * GB,
    "A10G": 24 * GB,
    "L40S": 48 * GB,
    "A100": 40 * GB,
    "A100-40G": 40 * GB,
    "A100-80G": 80 * GB,
    "H100": 80 * GB,
    "H200": 141 * GB,
    "GH200": 96 * GB,
    "B200": 180 * GB,
    "AMD-Instinct-MI300X-OAM": 192 * GB,
}
"""By Ray's `accelerator_type`, as the makers state it; the smallest where there are several."""


def memory_of(options: dict[str, Any], gpu_memory: int | None, host_memory: int | None) -> int | None:
    """Bytes that a process with these `ray_actor_options` may fill; None if nothing tells.

    gpu_memory, host_memory: of one GPU, or of a process without one, where the YAML does not say.
    A process fills one GPU at most, and of a shared one its part.
    """
    gpus = options.get("num_gpus") or 0
    if not gpus:
        return options.get("memory") or host_memory
    whole = gpu_memory or GPU_BYTES.get(str(options.get("accelerator_type") or ""))
    return None if whole is None else int(whole * min(1, gpus))
