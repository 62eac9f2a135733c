"""The shape of the model: everything that makes Llama 4 Scout, small."""

from model.args import ModelArgs, MoEArgs, Size, VisionArgs

TILE = Size(height=32, width=32)
PATCH = Size(height=8, width=8)


def tiny_scout(vocab_size: int) -> ModelArgs:
    """About 1.8 million parameters, of which a token meets a third. Every layer has experts, as in Scout."""
    return ModelArgs(
        dim=128,
        n_layers=4,
        n_heads=4,
        n_kv_heads=2,
        head_dim=32,
        vocab_size=vocab_size,
        ffn_hidden_dim=128,
        attention_chunk_size=64,
        nope_layer_interval=2,
        use_qk_norm=True,
        attn_temperature_tuning=True,
        floor_scale=64,
        moe_args=MoEArgs(num_experts=8, top_k=1, hidden_dim=96),
        vision_args=VisionArgs(
            image_size=TILE, patch_size=PATCH, dim=64, n_layers=2, n_heads=4, mlp_ratio=4.0, output_dim=128,
            pixel_shuffle_ratio=0.5,
        ),
        max_seq_len=2048,
    )  # fmt: skip
