"""The experts that one server holds, ready to compute."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cluster.experts.table import Unit
from model.checkpoint import Checkpoint, ExpertWeights
from model.kernels import cpu
from model.packed import PackedSwiGLU, can_pack_experts


class NotHeld(Exception):
    """The expert is not on this server (any more)."""


class HeldExperts:
    """Loads, computes and forgets experts of `checkpoint`, in `dtype`.

    `load` may run in one thread while another computes.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        args = checkpoint.args
        self.dim, self.hidden_dim, self.dtype = args.dim, args.expert_hidden_dim, dtype
        self._checkpoint = checkpoint
        shape = args.n_layers, args.moe_args.num_experts if args.moe_args else 0
        self.rows = np.zeros(shape, np.int64)
        """[layers, experts], those computed so far."""
        self.addresses = np.zeros(shape, np.uintp), np.zeros(shape, np.uintp)
        """Of packed weights (gate and up, down), [layers, experts], 0: not held. To be used with `lock` held."""
        self.lock = threading.Lock()
        self.are_packed = packed = can_pack_experts(args, dtype)
        self._prepare: Callable[[ExpertWeights], Any] = _pack if packed else _keep
        self._compute: Callable[[list[Any], Sequence[int], Tensor], Tensor] = (
            _compute_packed if packed else _compute_plain
        )
        self._experts: dict[Unit, Any] = {}

    @property
    def units(self) -> frozenset[Unit]:
        return frozenset(self._experts.copy())

    def bytes_per_unit(self) -> int:
        args = self._checkpoint.args
        return 3 * args.dim * args.expert_hidden_dim * self.dtype.itemsize

    def load(self, unit: Unit) -> None:
        """Raises CheckpointError."""
        weights = self._prepare(self._checkpoint.read_expert(*unit, dtype=self.dtype))
        with self.lock:
            self._experts[unit] = weights
            if self.are_packed:
                self.addresses[0][unit], self.addresses[1][unit] = weights.w13.address, weights.w2.address

    def drop(self, unit: Unit) -> None:
        with self.lock:
            self.addresses[0][unit] = self.addresses[1][unit] = 0
            self._experts.pop(unit, None)

    def compute(self, layer: int, experts: Sequence[int], counts: Sequence[int], x: Tensor) -> Tensor:
        """x: [rows, dim], `counts[i]` rows for each of `experts` in turn -> like x. Raises NotHeld."""
        held = []
        for expert in experts:
            weights = self._experts.get((layer, expert))
            if weights is None:
                raise NotHeld(f"expert {expert} of layer {layer}")
            held.append(weights)
        out = self._compute(held, counts, x) if held else x
        np.add.at(self.rows[layer], experts, counts)
        return out


def _pack(weights: ExpertWeights) -> PackedSwiGLU:
    return PackedSwiGLU(weights.w1.T, weights.w2.T, weights.w3.T)


def _compute_packed(held: list[PackedSwiGLU], counts: Sequence[int], x: Tensor) -> Tensor:
    return cpu.swiglus(x, [expert.w13 for expert in held], [expert.w2 for expert in held], counts)


def _keep(weights: ExpertWeights) -> ExpertWeights:
    return weights


def _compute_plain(held: list[ExpertWeights], counts: Sequence[int], x: Tensor) -> Tensor:
    """As `LocalExperts.compute`."""
    parts = x.split(list(counts))
    outputs = [(F.silu(rows @ w1) * (rows @ w3)) @ w2 for (w1, w2, w3), rows in zip(held, parts, strict=True)]
    return torch.cat(outputs)
