"""Pipeline stages: which layers are whose. Pure arithmetic on names and numbers."""

import re
from dataclasses import dataclass

_LAYER = re.compile(r"layers\.(\d+)\.")


@dataclass(frozen=True)
class Stage:
    """One of `count` stages. The layers are cut evenly; all that is not a layer belongs to the first stage.

    A batch goes round in a ring: from the first stage, which embeds tokens, through the layers of
    each, and back to the first, which has the last norm and the output projection, and samples.
    """

    index: int
    count: int

    @property
    def is_first(self) -> bool:
        return self.index == 0

    def layers(self, n_layers: int) -> range:
        """This stage's layers. Raises ValueError when there are fewer layers than stages."""
        if n_layers < self.count:
            raise ValueError(f"{self.count} pipeline stages cannot share {n_layers} layers")
        return range(self.index * n_layers // self.count, (self.index + 1) * n_layers // self.count)

    def owns(self, name: str, n_layers: int) -> bool:
        """Whether the parameter `name` (Meta's) is on this stage."""
        layer = _LAYER.match(name)
        return int(layer[1]) in self.layers(n_layers) if layer else self.is_first


WHOLE = Stage(0, 1)
