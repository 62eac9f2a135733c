"""The serving form of a bfloat16 model on a CPU: the same tree of modules, some swapped for packed ones.

`pack` replaces attention, feed-forward, norms and the output projection of an `LLM`, in place,
by modules that call the kernels of `model.kernels.cpu`. The originals stay the readable
definition and the oracle; a packed model serves `LLM.step` and nothing else.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.args import ModelArgs
from model.datatypes import PagedBatch
from model.kernels import cpu
from model.kv_cache import PagedCache
from model.layers import Attention, FeedForward, Positional, RMSNorm
from model.model import LLM
from model.moe import Experts, LocalExperts, MoE, Ready, compute_by_expert, dispatch, route
from model.parallel import model_parallel_rank, model_parallel_size, reduce


def can_pack(args: ModelArgs, dtype: torch.dtype, block_size: int) -> bool:
    """Whether the kernels are there and take this model's shapes."""
    hidden = [args.hidden_dim] if args.moe_args is None else [args.hidden_dim, args.expert_hidden_dim]
    widths = (args.width_of_head, args.dim, *(width // model_parallel_size() for width in hidden))
    fits = all(width % cpu.LANES == 0 for width in widths) and args.width_of_head <= cpu.MAX_HEAD_DIM
    return dtype is torch.bfloat16 and block_size % cpu.LANES == 0 and fits and cpu.available()


def can_pack_experts(args: ModelArgs, dtype: torch.dtype) -> bool:
    """Whether the kernels are there and take whole experts of this model, those of no rank in particular."""
    fits = args.dim % cpu.LANES == 0 and args.expert_hidden_dim % cpu.LANES == 0
    return dtype is torch.bfloat16 and fits and cpu.available()


@torch.no_grad()
def pack(model: LLM) -> LLM:
    """Swaps the modules of `model` for packed ones and frees the weights they came from."""
    if model.stage.is_first:
        output = model.output or model.tok_embeddings
        model.output = PackedOutput(output.get_parameter("weight"))
        model.norm = _packed(model.norm)
        model.tok_embeddings = PackedEmbedding(model.tok_embeddings.get_parameter("weight"))
    for block in model.blocks():
        for name, part in block.named_children():
            setattr(block, name, _packed(part))
    return model


def _packed(plain: nn.Module) -> nn.Module:
    match plain:
        case Attention():
            return PackedAttention(plain)
        case MoE():
            return PackedMoE(plain)
        case FeedForward():
            return PackedFeedForward(plain)
        case RMSNorm():
            return PackedRMSNorm(plain)
    raise TypeError(f"no packed form of {type(plain).__name__}")


class PackedCache(PagedCache):
    """A `PagedCache` whose blocks lie in tiles as the kernels read them."""

    def at(self, batch: PagedBatch) -> "PackedStep":
        return PackedStep(self, batch)


class PackedStep:
    """One step over a `PackedCache`; `PackedAttention` reads it directly."""

    def __init__(self, cache: PackedCache, batch: PagedBatch) -> None:
        self.places, self.tables = cache.places, batch.block_tables.unbind(0)
        self.batch, self.block_size = batch, cache.block_size

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, chunk: int | None) -> Tensor:
        raise TypeError("a PackedCache serves packed models only: call model.packed.pack(model)")


class PackedAttention(nn.Module):
    """`Attention` as two matrix products around one kernel that rotates, caches and attends."""

    def __init__(self, plain: Attention) -> None:
        super().__init__()
        self.layer, self.heads, self.kv_heads, self.head_dim = plain.layer, plain.heads, plain.kv_heads, plain.head_dim
        self.is_nope, self.chunk, self.qk_norm_eps = plain.is_nope, plain.chunk or 0, plain.qk_norm_eps or 0.0
        self.wqkv = cpu.PackedLinear(torch.cat([plain.wq.weight, plain.wk.weight, plain.wv.weight]))
        self.wo = cpu.PackedLinear(plain.wo.weight)

    def forward(self, x: Tensor, where: Positional, kv: PackedStep) -> Tensor:
        cosine, sine, temperature = (
            (None, None, where.temperature) if self.is_nope else (where.cosine, where.sine, None)
        )
        group, keys, values = kv.places[self.layer]
        out = cpu.paged_attention(
            self.wqkv(x), cosine, sine, temperature, keys, values, kv.tables[group], kv.batch,
            self.heads, self.kv_heads, self.head_dim, kv.block_size, self.chunk, self.qk_norm_eps,
        )  # fmt: skip
        return reduce(self.wo(out))


class PackedSwiGLU:
    """One feed-forward or expert: gate and up in a product that ends in SwiGLU, then down. Not summed over ranks."""

    def __init__(self, w1: Tensor, w2: Tensor, w3: Tensor) -> None:
        """w1, w3: [hidden, dim]; w2: [dim, hidden]."""
        self.w13 = cpu.PackedSwiGLU(w1, w3)
        self.w2 = cpu.PackedLinear(w2)

    def __call__(self, x: Tensor) -> Tensor:
        """x: bfloat16 [rows, dim] -> like x."""
        return self.w2(self.w13(x))


class PackedFeedForward(nn.Module):
    """`FeedForward` over packed weights."""

    def __init__(self, plain: FeedForward) -> None:
        super().__init__()
        self.swiglu = PackedSwiGLU(plain.w1.weight, plain.w2.weight, plain.w3.weight)

    def forward(self, x: Tensor) -> Tensor:
        return reduce(self.swiglu(x))


class PackedExperts:
    """`LocalExperts` over packed weights."""

    is_whole = False

    def __init__(self, plain: LocalExperts) -> None:
        weights = zip(plain.w1, plain.w2, plain.w3, strict=True)
        swiglus = [PackedSwiGLU(w1.T, w2.T, w3.T) for w1, w2, w3 in weights]
        self.w13, self.w2 = [each.w13 for each in swiglus], [each.w2 for each in swiglus]

    def submit(self, x_kD: Tensor, experts_k: Tensor, routed_k: Tensor | None = None) -> Ready:
        return Ready(compute_by_expert(x_kD, experts_k, len(self.w13), self.compute))

    def compute(self, x: Tensor, counts: list[int]) -> Tensor:
        """As `LocalExperts.compute`, in one call."""
        return cpu.swiglus(x, self.w13, self.w2, counts)


class PackedMoE(nn.Module):
    """`MoE` over packed weights; the shared expert and the routed ones are summed over ranks together."""

    def __init__(self, plain: MoE) -> None:
        super().__init__()
        self.args = plain.args
        self.router = cpu.PackedLinear(plain.router_DE.T)
        experts = plain.experts
        self.experts: Experts = PackedExperts(experts) if isinstance(experts, LocalExperts) else experts
        shared = plain.shared_expert
        self.shared_expert = (
            None if shared is None else PackedSwiGLU(shared.w1.weight, shared.w2.weight, shared.w3.weight)
        )

    def forward(self, x: Tensor) -> Tensor:
        experts, weights = route(self.router(x, torch.float32), self.args)
        return reduce(dispatch(x, experts, weights.to(x.dtype), self.experts, self.shared_expert, self.args))


class PackedRMSNorm(nn.Module):
    """`RMSNorm` in one kernel."""

    def __init__(self, plain: RMSNorm) -> None:
        super().__init__()
        self.eps, self.weight = plain.eps, plain.weight

    def forward(self, x: Tensor) -> Tensor:
        return cpu.rms_norm(x, self.weight, self.eps)


class PackedEmbedding(nn.Module):
    """Rows of the vocabulary, which is split over ranks: those of other ranks count as zero in the sum."""

    def __init__(self, weight: Tensor) -> None:
        """weight: [vocab_size / ranks, dim]."""
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.first = model_parallel_rank() * len(weight) if model_parallel_size() > 1 else None

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: int64 [rows] -> [rows, dim]."""
        if self.first is None:
            return F.embedding(tokens, self.weight)
        own = tokens - self.first
        absent = (own < 0) | (own >= len(self.weight))
        return reduce(F.embedding(own.masked_fill_(absent, 0), self.weight).masked_fill_(absent.unsqueeze(-1), 0))


class PackedOutput(nn.Module):
    """The output projection; its logits are float32, never rounded to bfloat16."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.projection = cpu.PackedLinear(weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.projection(x, torch.float32)
