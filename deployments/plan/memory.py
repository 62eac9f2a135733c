"""How much memory one process has, a rank or an expert server, as far as its YAML tells."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

GB = 10**9
_ACCELERATOR = "accelerator_type:"

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


@dataclass(frozen=True)
class Resources:
    """What the YAML asks of Ray for one process. memory: bytes, None if it does not say."""

    gpus: float = 0
    accelerator_type: str | None = None
    memory: int | None = None

    @classmethod
    def of_actor(cls, options: Mapping[str, Any]) -> "Resources":
        """From `ray_actor_options`."""
        return cls(options.get("num_gpus") or 0, options.get("accelerator_type") or None, options.get("memory"))

    @classmethod
    def of_bundle(cls, bundle: Mapping[str, float]) -> "Resources":
        """From a bundle of a placement group, where an accelerator is a resource called after its type."""
        kinds = [key.removeprefix(_ACCELERATOR) for key in bundle if key.startswith(_ACCELERATOR)]
        memory = bundle.get("memory")
        return cls(bundle.get("GPU", 0), kinds[0] if kinds else None, None if memory is None else int(memory))

    def fill(self, gpu_memory: int | None, host_memory: int | None) -> int | None:
        """Bytes that the process may fill; None if nothing tells.

        gpu_memory, host_memory: of one GPU, and of a process without one, where the YAML does not say.
        A process fills one GPU at most, and of a shared one its part.
        """
        if not self.gpus:
            return self.memory or host_memory
        whole = gpu_memory or GPU_BYTES.get(self.accelerator_type or "")
        return None if whole is None else int(whole * min(1, self.gpus))
