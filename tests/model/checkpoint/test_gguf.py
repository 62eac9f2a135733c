from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from model import LLM
from model.args import ModelArgs
from model.checkpoint import CheckpointError, open_checkpoint

ARGS = ModelArgs(
    dim=128, n_layers=2, n_heads=8, n_kv_heads=4, vocab_size=96, ffn_hidden_dim=192, rope_theta=1e4, max_seq_len=77
)
NAMES = {
    "tok_embeddings": "token_embd",
    "attention.wq": "attn_q",
    "attention.wk": "attn_k",
    "attention.wv": "attn_v",
    "attention.wo": "attn_output",
    "attention_norm": "attn_norm",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up",
    "layers.": "blk.",
}


def _gguf_name(name: str) -> str:
    if name == "norm.weight":
        return "output_norm.weight"
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    return name


def _write(path: Path, weights, kind=gguf.GGMLQuantizationType.F32, architecture="llama", extra=None, **settings):
    writer = gguf.GGUFWriter(path, architecture)
    defaults = {
        "block_count": ARGS.n_layers,
        "context_length": ARGS.max_seq_len,
        "embedding_length": ARGS.dim,
        "feed_forward_length": ARGS.hidden_dim,
        "attention__head_count": ARGS.n_heads,
        "attention__head_count_kv": ARGS.kv_heads,
        "attention__layer_norm_rms_epsilon": ARGS.norm_eps,
    }
    adders = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array}
    for key, value in (defaults | settings).items():
        adders[type(value)]("llama." + key.replace("__", "."), value)
    for name, tensor in (weights | (extra or {})).items():
        values = tensor.numpy()
        use = kind if tensor.dim() > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(_gguf_name(name), gguf.quantize(values, use), raw_dtype=use)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_1"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_together_hold_every_tensor(tmp_path, meta_weights, reassemble, kind, world_size):
    kind = gguf.GGMLQuantizationType[kind]
    weights = meta_weights(ARGS)
    checkpoint = open_checkpoint(_write(tmp_path / "a.gguf", weights, kind))
    whole = reassemble(checkpoint, world_size)
    assert set(whole) == set(weights)
    for name, tensor in weights.items():
        expected = tensor
        if tensor.dim() > 1:
            expected = torch.tensor(gguf.dequantize(gguf.quantize(tensor.numpy(), kind), kind))
        assert torch.equal(whole[name], expected)


def test_the_architecture_is_read(tmp_path, meta_weights):
    assert open_checkpoint(_write(tmp_path / "a.gguf", meta_weights(ARGS))).args == ARGS.model_copy(
        update={"head_dim": 16, "norm_eps": float(np.float32(ARGS.norm_eps))}
    )


def test_a_file_without_an_output_tensor_is_tied_and_fills_a_model(tmp_path, meta_weights):
    weights = meta_weights(ARGS.model_copy(update={"tie_word_embeddings": True}))
    checkpoint = open_checkpoint(_write(tmp_path / "a.gguf", weights))
    assert checkpoint.args.tie_word_embeddings
    model = LLM(checkpoint.args, initialize=False)
    checkpoint.load_into(model)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name])


def test_extra_tensors_are_reported_by_the_name_in_the_file(tmp_path, meta_weights):
    path = _write(tmp_path / "a.gguf", meta_weights(ARGS), extra={"blk.1.attn_q.bias": torch.ones(128)})
    checkpoint = open_checkpoint(path)
    with pytest.raises(CheckpointError, match=r"1 extra: blk\.1\.attn_q\.bias"):
        checkpoint.load_into(LLM(checkpoint.args))


@pytest.mark.parametrize(
    ("settings", "culprit"),
    [
        ({"expert_count": 8}, "llama.expert_count = 8"),
        ({"attention__head_count": 0}, "llama.attention.head_count = 0"),
        ({"attention__head_count": [8, 4]}, "llama.attention.head_count = [8, 4]"),
        ({"feed_forward_length": [192, 96]}, "ffn_hidden_dim"),
        ({"rope__dimension_count": 8}, "llama.rope.dimension_count = 8"),
        ({"attention__value_length": 32}, "llama.attention.value_length = 32"),
        ({"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0}, "llama.rope.scaling.type = 'yarn'"),
        ({"rope__scaling__type": "linear", "rope__scaling__factor": 2.0}, "llama.rope.scaling.type = 'linear'"),
        ({"rope__scaling__factor": 2.0}, "llama.rope.scaling.factor = 2.0"),
        ({"attention__sliding_window": 4096}, "llama.attention.sliding_window = 4096"),
    ],
)
def test_what_is_not_supported_is_named(tmp_path, meta_weights, settings, culprit):
    path = _write(tmp_path / "a.gguf", meta_weights(ARGS), **settings)
    with pytest.raises(CheckpointError) as raised:
        open_checkpoint(path)
    assert culprit in str(raised.value)


def test_other_architectures_are_refused(tmp_path, meta_weights):
    with pytest.raises(CheckpointError, match="architecture 'qwen2' is not supported"):
        open_checkpoint(_write(tmp_path / "a.gguf", meta_weights(ARGS), architecture="qwen2"))


def test_other_tensor_types_are_refused(tmp_path, meta_weights):
    kind = gguf.GGMLQuantizationType.MXFP4
    with pytest.raises(CheckpointError, match=r"unsupported types, such as .*\(MXFP4\).*Supported are .*Q4_1"):
        open_checkpoint(_write(tmp_path / "a.gguf", meta_weights(ARGS), kind))
