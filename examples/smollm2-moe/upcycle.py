"""Makes a mixture of experts of SmolLM2 that speaks exactly as SmolLM2 does.

Each feed-forward is cut by hidden channels into two halves. One becomes the shared expert. The
other becomes every one of eight experts, each with the channels in an order of its own: a SwiGLU
does not change under that, but weights mixed up between experts do show. Routers look at what
makes tokens differ, and their scores are so large that the best one's sigmoid is exactly 1.

    python examples/smollm2-moe/upcycle.py
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor

from deployments.front.tokenizer import Tokenizer, open_tokenizer
from deployments.front.tokenizer.huggingface import HuggingFaceTokenizer
from model import LLM, ModelArgs, TransformerInput
from model.args import MoEArgs
from model.checkpoint import open_checkpoint

MODELS = Path(__file__).parents[2] / "models"
NUM_EXPERTS = 8
SCORE_SCALE = 4096.0
"""Of the deviation of scores. A sigmoid is 1 in float32 from 17.4 on: four scores below that at once do not happen."""
SKEWS = (1.0, 0.8, 0.65, 0.5)
"""One for each pair of experts: how often it wins over the others."""
PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "Once upon a time, in a village by the sea, there lived",
    "Water boils at 100 degrees because",
    "1, 1, 2, 3, 5, 8, 13,",
    "Dear Sir or Madam,\n\nI am writing to",
    "Die Hauptstadt von Deutschland ist",
    "SELECT name, price FROM products WHERE",
    "The three laws of thermodynamics are",
    "Q: What is 7 times 8?\nA:",
    "In 1969, the first human being to walk on the moon",
    '{"name": "Ada", "born": 1815, "works":',
)

State = dict[str, Tensor]


def moe_args(dense: ModelArgs) -> ModelArgs:
    """The same model with half of each feed-forward routed to one of the experts."""
    moe = MoEArgs(num_experts=NUM_EXPERTS, top_k=1, hidden_dim=dense.hidden_dim // 2)
    return dense.model_copy(update={"moe_args": moe})


def upcycled(dense: LLM, calibration: Tensor, seed: int) -> Iterator[tuple[str, State]]:
    """Prefix and tensors, under Meta's names, of everything outside layers, then of each layer.

    calibration: int64 [rows, length], tokens that show each router what it will see.
    """
    generator = torch.Generator().manual_seed(seed)
    state = dense.state_dict()
    yield "", {name: tensor for name, tensor in state.items() if not name.startswith("layers.")}
    for layer, seen in enumerate(inputs_of_feed_forwards(dense, calibration)):
        prefix = f"layers.{layer}."
        block = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        w1, w2, w3 = (block.pop(f"feed_forward.{name}.weight") for name in ("w1", "w2", "w3"))
        yield prefix, block | experts(w1, w2, w3, generator) | {"feed_forward.router_DE": router(seen, generator)}


def experts(w1: Tensor, w2: Tensor, w3: Tensor, generator: torch.Generator) -> State:
    """w1, w3: [hidden, dim]; w2: [dim, hidden]. Half of hidden for all tokens, the other half for each expert."""
    hidden = w1.shape[0]
    shared, routed = torch.randperm(hidden, generator=generator).split([hidden - hidden // 2, hidden // 2])
    orders = [routed[torch.randperm(len(routed), generator=generator)] for _ in range(NUM_EXPERTS)]
    return {
        "feed_forward.shared_expert.w1.weight": w1[shared],
        "feed_forward.shared_expert.w2.weight": w2[:, shared],
        "feed_forward.shared_expert.w3.weight": w3[shared],
        "feed_forward.experts.w1": torch.stack([w1[order].T for order in orders]),
        "feed_forward.experts.w2": torch.stack([w2[:, order].T for order in orders]),
        "feed_forward.experts.w3": torch.stack([w3[order].T for order in orders]),
    }


def router(seen: Tensor, generator: torch.Generator) -> Tensor:
    """[dim, experts]: pairs of opposite directions, blind to what all tokens have in common.

    seen: [tokens, dim]. Of a pair one score is positive, so the best of all is far above zero.
    """
    common = torch.nn.functional.normalize(seen.mean(0), dim=0)
    directions = torch.randn(seen.shape[1], NUM_EXPERTS // 2, generator=generator)
    directions -= torch.outer(common, common @ directions)
    directions *= SCORE_SCALE * torch.tensor(SKEWS) / (seen @ directions).std(0)
    return torch.stack([directions, -directions], dim=2).flatten(1)


@torch.no_grad()
def inputs_of_feed_forwards(model: LLM, tokens: Tensor) -> list[Tensor]:
    """What each layer's feed-forward sees, first tokens left out, for they are like no other: [tokens, dim] each."""
    seen: list[Tensor] = []
    hooks = [
        block.ffn_norm.register_forward_hook(lambda _module, _inputs, out: seen.append(out[:, 1:].flatten(0, 1)))
        for block in model.blocks()
    ]
    model(TransformerInput(tokens))
    for hook in hooks:
        hook.remove()
    return seen


def expert_use(model: LLM, inputs: list[Tensor]) -> Tensor:
    """How many tokens each layer's experts get, of what its feed-forward sees: int64 [layers, experts]."""
    return torch.stack(
        [
            torch.bincount((x @ block.feed_forward.get_parameter("router_DE")).argmax(-1), minlength=NUM_EXPERTS)
            for x, block in zip(inputs, model.blocks(), strict=True)
        ]
    )


_NAMES = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "feed_forward.shared_expert.w1.weight": "feed_forward.shared_expert.gate_proj.weight",
    "feed_forward.shared_expert.w2.weight": "feed_forward.shared_expert.down_proj.weight",
    "feed_forward.shared_expert.w3.weight": "feed_forward.shared_expert.up_proj.weight",
    "feed_forward.experts.w2": "feed_forward.experts.down_proj",
    "feed_forward.router_DE": "feed_forward.router.weight",
}


def huggingface_state(prefix: str, state: State) -> State:
    """The same under the names and in the layouts of `transformers`' Llama4ForCausalLM."""
    state = dict(state)
    named = {}
    if "feed_forward.router_DE" in state:
        gate_and_up = [state.pop("feed_forward.experts.w1"), state.pop("feed_forward.experts.w3")]
        named[f"model.{prefix}feed_forward.experts.gate_up_proj"] = torch.cat(gate_and_up, dim=2)
        state["feed_forward.router_DE"] = state["feed_forward.router_DE"].T
    return named | {(f"model.{prefix}" if prefix else "") + _NAMES[name]: tensor for name, tensor in state.items()}


def huggingface_config(args: ModelArgs, dtype: torch.dtype) -> dict[str, object]:
    """config.json of a Llama4ForCausalLM. Every layer is rotated and sees the whole context."""
    assert args.moe_args is not None
    return {
        "architectures": ["Llama4ForCausalLM"],
        "model_type": "llama4_text",
        "dtype": str(dtype).removeprefix("torch."),
        "hidden_size": args.dim,
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.kv_heads,
        "head_dim": args.width_of_head,
        "vocab_size": args.vocab_size,
        "intermediate_size": args.expert_hidden_dim,
        "intermediate_size_mlp": args.hidden_dim,
        "num_local_experts": args.moe_args.num_experts,
        "num_experts_per_tok": args.moe_args.top_k,
        "interleave_moe_layer_step": 1,
        "rms_norm_eps": args.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": args.rope_theta},
        "max_position_embeddings": args.max_seq_len,
        "tie_word_embeddings": args.tie_word_embeddings,
        "no_rope_layers": [1] * args.n_layers,
        "layer_types": ["full_attention"] * args.n_layers,
        "attention_chunk_size": args.max_seq_len,
        "use_qk_norm": False,
        "attn_temperature_tuning": False,
    }


def write(folder: Path, args: ModelArgs, parts: Iterator[tuple[str, State]], dtype: torch.dtype) -> None:
    """A Hugging Face folder, one safetensors file for each part, so that little memory is needed."""
    folder.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    num_files = args.n_layers + 1
    for number, (prefix, state) in enumerate(track(parts, "Upcycling", num_files), start=1):
        file = f"model-{number:05d}-of-{num_files:05d}.safetensors"
        stored = {name: tensor.to(dtype).contiguous() for name, tensor in huggingface_state(prefix, state).items()}
        save_file(stored, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(stored, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    (folder / "config.json").write_text(json.dumps(huggingface_config(args, dtype), indent=1))


def write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """tokenizer.json and, beside it, special tokens, ends of an answer and the chat template."""
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        raise TypeError("this writes tokenizers of the `tokenizers` library only")
    tokenizer.save(folder / "tokenizer.json")
    settings = {**tokenizer.special_tokens, "chat_template": tokenizer.chat_template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
    ends = {"eos_token_id": list(tokenizer.eos_token_ids)}
    (folder / "generation_config.json").write_text(json.dumps(ends, indent=1))


def calibration_tokens(tokenizer: Tokenizer, length: int = 48) -> Tensor:
    """int64 [rows, length]: the prompts one after the other, each row starting at another of them."""
    rows = []
    for first in range(len(PROMPTS)):
        text = "\n\n".join(PROMPTS[first:] + PROMPTS[:first])
        rows.append(tokenizer.encode(text)[:length])
    return torch.tensor(rows)


def greedy(model: LLM, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    """The most likely continuation of each prompt."""
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    padded = torch.tensor([prompt + [0] * (int(lengths.max()) - len(prompt)) for prompt in prompts])
    logits = model(TransformerInput(padded), inference=True).logits
    # What padding left in the cache is overwritten before it can be seen.
    answers = [logits[torch.arange(len(prompts)), lengths - 1].argmax(-1)]
    for step in range(num_tokens - 1):
        now = TransformerInput(answers[-1][:, None], lengths + step)
        answers.append(model(now, inference=True).logits[:, 0].argmax(-1))
    return torch.stack(answers, dim=1).tolist()


@torch.no_grad()
def load(location: Path, num_rows: int, rounded_to: torch.dtype = torch.float32) -> LLM:
    """The model at `location`, weights rounded and float32 again, with a cache for `num_rows` short texts."""
    checkpoint = open_checkpoint(location)
    model = LLM(checkpoint.args.model_copy(update={"max_batch_size": num_rows, "max_seq_len": 256}), initialize=False)
    checkpoint.load_into(model)
    for parameter in model.parameters():
        parameter.copy_(parameter.to(rounded_to))
    return model


def use_table(use: Tensor) -> Table:
    """Percent of tokens by layer and expert."""
    table = Table(title="Tokens by expert, percent", title_justify="left")
    for heading in ("layer", *map(str, range(NUM_EXPERTS))):
        table.add_column(heading, justify="right")
    for layer, counts in enumerate(use.tolist()):
        table.add_row(str(layer), *(f"{100 * count / sum(counts):.0f}" for count in counts))
    return table


def check(source: Path, folder: Path, tokenizer: Tokenizer, dtype: torch.dtype, num_tokens: int = 64) -> None:
    """Both models answer the same prompts, weights in `dtype`, sums in float32.

    Raises SystemExit when one token differs, or an expert gets none.
    """
    console = Console()
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    with console.status("SmolLM2 answers"):
        expected = greedy(load(source, len(prompts), dtype), prompts, num_tokens)
    moe = load(folder, len(prompts))
    with console.status("Its mixture of experts answers"):
        got = greedy(moe, prompts, num_tokens)
    same = sum(ours == theirs for ours, theirs in zip(got, expected, strict=True))
    use = expert_use(moe, inputs_of_feed_forwards(moe, torch.tensor(expected)))
    console.print(use_table(use))
    console.print(f"{same} of {len(prompts)} prompts continue identically for {num_tokens} tokens")
    if same < len(prompts) or not bool(use.all()):
        raise SystemExit("The mixture of experts is not SmolLM2, or does not use all of its experts")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, default=MODELS / "SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--folder", type=Path, default=MODELS / "smollm2-moe")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the weights on disk")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-check", action="store_true", help="do not compare it with SmolLM2 in the end")
    options = parser.parse_args()
    if not options.source.is_file():
        parser.error(f"{options.source} is not there: `make model` fetches it")
    dtype = getattr(torch, options.dtype)
    tokenizer = open_tokenizer(str(options.source))
    dense = load(options.source, 1)
    args = moe_args(open_checkpoint(options.source).args)
    parts = upcycled(dense, calibration_tokens(tokenizer), options.seed)
    write(options.folder, args, parts, dtype)
    write_tokenizer(options.folder, tokenizer)
    size = sum(file.stat().st_size for file in options.folder.glob("*.safetensors"))
    print(f"Wrote {size / 1e9:.2f} GB to {options.folder}")
    if not options.no_check:
        check(options.source, options.folder, tokenizer, dtype)


if __name__ == "__main__":
    main()
