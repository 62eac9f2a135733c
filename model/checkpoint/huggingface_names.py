"""Names and layouts of tensors as `transformers` saves them, made Meta's."""

import re
from collections.abc import Mapping

from model.args import ModelArgs
from model.checkpoint.errors import CheckpointError
from model.checkpoint.huggingface_vision import vision_name
from model.checkpoint.source import Interleaved, Part, Stacked, TensorSource, Transposed

_NAMES = {
    "model.embed_tokens.weight": "tok_embeddings.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER_NAMES = {
    "self_attn.q_proj.weight": "attention.wq.weight",
    "self_attn.k_proj.weight": "attention.wk.weight",
    "self_attn.v_proj.weight": "attention.wv.weight",
    "self_attn.o_proj.weight": "attention.wo.weight",
    "mlp.gate_proj.weight": "feed_forward.w1.weight",
    "mlp.down_proj.weight": "feed_forward.w2.weight",
    "mlp.up_proj.weight": "feed_forward.w3.weight",
    "feed_forward.gate_proj.weight": "feed_forward.w1.weight",
    "feed_forward.down_proj.weight": "feed_forward.w2.weight",
    "feed_forward.up_proj.weight": "feed_forward.w3.weight",
    "feed_forward.shared_expert.gate_proj.weight": "feed_forward.shared_expert.w1.weight",
    "feed_forward.shared_expert.down_proj.weight": "feed_forward.shared_expert.w2.weight",
    "feed_forward.shared_expert.up_proj.weight": "feed_forward.shared_expert.w3.weight",
    "feed_forward.router.weight": "feed_forward.router_DE",
    "block_sparse_moe.gate.weight": "feed_forward.router_DE",
    "feed_forward.experts.gate_up_proj": "feed_forward.experts.w13",
    "feed_forward.experts.down_proj": "feed_forward.experts.w2",
    "input_layernorm.weight": "attention_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
}
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_ROTATED = ("attention.wq.weight", "attention.wk.weight")
_ROUTER = "feed_forward.router_DE"
_GATE_AND_UP = "feed_forward.experts.w13"
_SINGLE_EXPERT = re.compile(r"model\.layers\.(\d+)\.block_sparse_moe\.experts\.(\d+)\.(w[123])\.weight")


def meta_sources(stored: Mapping[str, TensorSource], args: ModelArgs, *, halves: bool) -> dict[str, TensorSource]:
    """Meta's names -> what has their layout. What Meta has no name for keeps its own.

    halves: rotary pairs are the halves of a head.
    """
    sources: dict[str, TensorSource] = {}
    for name, source in _with_stacked_experts(stored, args).items():
        canonical = meta_name(name)
        if canonical.endswith(_ROTATED) and halves:
            sources[canonical] = Interleaved(source, args.width_of_head)
        elif canonical.endswith(_ROUTER):
            sources[canonical] = Transposed(source)
        elif canonical.endswith(_GATE_AND_UP):
            sources |= _gate_and_up(name, canonical.removesuffix("13"), source)
        else:
            sources[canonical] = source
    return sources


def _gate_and_up(name: str, canonical: str, source: TensorSource) -> dict[str, TensorSource]:
    """The halves of [experts, dim, 2 * hidden]; what is not of that kind keeps its name, to be reported."""
    if len(source.shape) != 3:
        return {name: source}
    width = source.shape[2] // 2
    return {f"{canonical}1": Part(source, 2, 0, width), f"{canonical}3": Part(source, 2, width, source.shape[2])}


def meta_name(name: str) -> str:
    """Meta's name of a tensor, or its own when Meta has none."""
    text = name.removeprefix("language_model.")  # beside an image encoder
    if layer := _LAYER.fullmatch(text):
        return f"layers.{layer[1]}.{_LAYER_NAMES[layer[2]]}" if layer[2] in _LAYER_NAMES else name
    return _NAMES[text] if text in _NAMES else vision_name(name)


def _with_stacked_experts(stored: Mapping[str, TensorSource], args: ModelArgs) -> dict[str, TensorSource]:
    """Mixtral's matrices of single experts as one stack for each layer; everything else as it is."""
    num_experts = args.moe_args.num_experts if args.moe_args else 0
    rest, stacks = {}, dict[str, dict[int, tuple[str, TensorSource]]]()
    for name, source in stored.items():
        single = _SINGLE_EXPERT.fullmatch(name)
        if single is None or int(single[2]) >= num_experts:
            rest[name] = source
        else:
            stack = f"layers.{single[1]}.feed_forward.experts.{single[3]}"
            stacks.setdefault(stack, {})[int(single[2])] = name, source
    return rest | {stack: _stacked(experts, num_experts) for stack, experts in stacks.items()}


def _stacked(experts: Mapping[int, tuple[str, TensorSource]], num_experts: int) -> TensorSource:
    first, model = next(iter(experts.values()))
    missing = [str(expert) for expert in range(num_experts) if expert not in experts]
    if missing:
        raise CheckpointError(f"missing: {first} is there, but not the same of expert {', '.join(missing)}")
    for name, source in experts.values():
        if source.shape != model.shape:
            raise CheckpointError(f"mis-shaped: {name} is {list(source.shape)}, but {first} is {list(model.shape)}")
    return Stacked(tuple(Transposed(experts[expert][1]) for expert in range(num_experts)))
