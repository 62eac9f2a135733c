"""A small vision model with weights at random, over HTTP: its answers are those of `LLM.forward`."""

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers

from deployments.front.images import ImageSettings
from deployments.front.images.prepare import prepare_bytes
from model import LLM, ModelArgs, TransformerInput
from model.args import MoEArgs, Size, VisionArgs
from model.datatypes import MaskedEmbedding
from model.vision.pixels import normalize_pixels
from tests.deployments.front.images.pictures import encoded, picture
from tests.e2e.conftest import metric

SPECIAL = (
    "<|image_start|>", "<|image_end|>", "<|image|>", "<|patch|>", "<|tile_x_separator|>", "<|tile_y_separator|>",
    "<|header_start|>", "<|header_end|>", "<|eot|>",
)  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}<|header_start|>{{ m.role }}<|header_end|>{% if m.content is string %}{{ m.content }}"
    "{% else %}{% for part in m.content %}{{ '<|image|>' if part.type == 'image' else part.text }}{% endfor %}"
    "{% endif %}<|eot|>{% endfor %}{% if add_generation_prompt %}<|header_start|>assistant<|header_end|>{% endif %}"
)
VISION = VisionArgs(
    image_size=Size(height=16, width=16), patch_size=Size(height=4, width=4), dim=32, n_layers=2, n_heads=2,
    mlp_ratio=2.0, output_dim=48, pixel_shuffle_ratio=0.5,
)  # fmt: skip
ARGS = ModelArgs(
    dim=64, n_layers=4, n_heads=4, n_kv_heads=2, vocab_size=288, ffn_hidden_dim=96, attention_chunk_size=24,
    nope_layer_interval=4, use_qk_norm=True, attn_temperature_tuning=True, max_seq_len=512, max_batch_size=1,
    moe_args=MoEArgs(num_experts=4, hidden_dim=64, interleave_moe_layer_step=2), vision_args=VISION,
)  # fmt: skip
SETTINGS = ImageSettings(16, VISION.tokens_per_tile)
PATCH = 256 + SPECIAL.index("<|patch|>")
NUM_TOKENS = 24

SMALL, WIDE, TALL = (encoded(picture("RGB", *size, seed=sum(size))) for size in ((16, 16), (40, 14), (15, 60)))


@pytest.fixture(scope="module")
def model() -> LLM:
    torch.manual_seed(0)
    model = LLM(ARGS).requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "adapter" not in name:
            parameter.normal_(std=1.5 * parameter.shape[-1] ** -0.5)
    return model


@pytest.fixture(scope="module")
def checkpoint(model: LLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as Meta saves it, with a tokenizer of bytes."""
    folder = tmp_path_factory.mktemp("seeing")
    torch.save(model.state_dict(), folder / "consolidated.00.pth")
    (folder / "params.json").write_text(json.dumps(ARGS.model_dump(mode="json")))
    vocabulary = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([tokenizers.AddedToken(name, special=True) for name in SPECIAL])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


ENGINES: dict[str, dict[str, Any]] = {
    "whole": {},
    "in-chunks": {"max_num_batched_tokens": 13},
    "packed": {"dtype": "bfloat16"},
}
"""Engines that serve the checkpoint, and their settings."""


@pytest.fixture(scope="module")
def url(start_stack: Callable[[dict[str, Any]], str], checkpoint: Path) -> str:
    common = {"dtype": "float32", "kv_cache_memory": "8MiB", "num_threads": 1}
    models = [{"id": name, "path": str(checkpoint), "engine": common | engine} for name, engine in ENGINES.items()]
    return start_stack({"models": models})


def ask(url: str, engine: str, *contents: list[str | bytes] | str, **fields: object) -> dict[str, Any]:
    """The answer to a conversation; bytes are images."""

    def part(content: str | bytes) -> dict[str, object]:
        if isinstance(content, str):
            return {"type": "text", "text": content}
        return {
            "type": "image_url",
            "image_url": {"url": "data:image/png;base64," + base64.b64encode(content).decode()},
        }

    messages = [
        {"role": ("user", "assistant")[i % 2], "content": c if isinstance(c, str) else [part(each) for each in c]}
        for i, c in enumerate(contents)
    ]
    body = {"model": engine, "messages": messages, "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}
    response = httpx.post(f"{url}/v1/chat/completions", json=body | {"return_token_ids": True} | fields, timeout=60)
    assert response.status_code == 200, response.text
    return response.json()


def expected(model: LLM, prompt: list[int], images: list[bytes]) -> list[int]:
    """Greedy tokens of `forward`, all of it computed anew for every token."""
    pixels = [normalize_pixels(torch.tensor(prepare_bytes(image, SETTINGS).tiles)) for image in images]
    tokens = list(prompt)
    for _ in range(NUM_TOKENS):
        batch = torch.tensor([tokens])
        mask = (batch == PATCH)[..., None]
        mask[:, len(prompt) :] = False
        seen = model.vision_embeddings([pixels], mask, model.tok_embeddings(batch))
        tokens.append(int(model(TransformerInput(batch, 0, MaskedEmbedding(seen, mask))).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("engine", ["in-chunks", "whole"])
def test_answers_equal_those_of_forward(model, url, engine):
    one = ["What is this? ", SMALL]
    outputs = []
    for contents, images in (
        ([["Look at", WIDE, "this"]], [WIDE]),
        ([[TALL, "and ", SMALL, WIDE, "?"]], [TALL, SMALL, WIDE]),
        ([one], [SMALL]),
        ([one, "A gradient.", ["And ", TALL]], [SMALL, TALL]),
        ([one, "A gradient.", ["And ", WIDE]], [SMALL, WIDE]),
        (["No image"], []),
    ):
        answer = ask(url, engine, *contents)
        outputs.append(answer["choices"][0]["token_ids"])
        assert outputs[-1] == expected(model, answer["prompt_token_ids"], images)
    assert len(set(map(tuple, outputs))) == len(outputs)  # the images made a difference
    assert metric(url, "moray:images_total", engine) == 9
    assert metric(url, "moray:image_encode_seconds_count", engine) == 3
    assert metric(url, "vllm:prefix_cache_hits_total", engine) > 0


def test_a_broken_image_over_http(url):
    body = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    request = {"model": "whole", "messages": [{"role": "user", "content": [body]}]}
    response = httpx.post(f"{url}/v1/chat/completions", json=request)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "invalid_image"


def test_the_packed_model_sees_as_the_plain_one_does(url):
    """bfloat16: the answer's likelihoods, not its tokens, are what is nearly equal."""
    contents = [["Look at", WIDE, "this"]], [["Look at", TALL, "this"]]
    fields = {"logprobs": True, "top_logprobs": 5, "max_tokens": 1}
    plain, packed = ([ask(url, engine, *each, **fields) for each in contents] for engine in ("whole", "packed"))

    def likelihoods(answer: dict[str, Any]) -> dict[str, float]:
        top = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        return {each["token"]: each["logprob"] for each in top}

    for expected, got in zip(map(likelihoods, plain), map(likelihoods, packed), strict=True):
        common = expected.keys() & got.keys()
        assert len(common) >= 3
        assert max(abs(expected[token] - got[token]) for token in common) < 0.3
    assert likelihoods(plain[0]).keys() != likelihoods(plain[1]).keys()
