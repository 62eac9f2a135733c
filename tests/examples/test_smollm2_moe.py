"""The upcycled SmolLM2 is SmolLM2: same logits, same tokens, every expert at work."""

import asyncio
import importlib.util
from pathlib import Path

import httpx
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from benchmarks.prompts import real_text
from deployments.front.tokenizer import open_tokenizer
from model import LLM, ModelArgs, TransformerInput
from model.checkpoint import open_checkpoint

ROOT = Path(__file__).parents[2]
SMOLLM2 = ROOT / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
SPEC = importlib.util.spec_from_file_location("upcycle", ROOT / "examples" / "smollm2-moe" / "upcycle.py")
upcycle = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(upcycle)

NUM_PROMPTS, NUM_TOKENS = 32, 64


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def source() -> Path:
    if not SMOLLM2.is_file():
        pytest.skip(f"{SMOLLM2} is not there: `make model` fetches it")
    return SMOLLM2


@pytest.fixture(scope="module")
def tokenizer(source):
    return open_tokenizer(str(source))


@pytest.fixture(scope="module")
def dense(source) -> LLM:
    return upcycle.load(source, 8)


@pytest.fixture(scope="module")
def moe(dense, tokenizer) -> LLM:
    model = LLM(upcycle.moe_args(dense.args), initialize=False)
    parts = upcycle.upcycled(dense, upcycle.calibration_tokens(tokenizer), seed=0)
    state = {prefix + name: tensor for prefix, part in parts for name, tensor in part.items()}
    model.load_state_dict(state, assign=True)
    return model


@pytest.fixture(scope="module")
def inputs(moe, tokenizer) -> list[torch.Tensor]:
    return upcycle.inputs_of_feed_forwards(moe, upcycle.calibration_tokens(tokenizer))


@torch.no_grad()
def test_it_speaks_token_for_token_like_the_dense_model(dense, moe, tokenizer):
    """By induction: after a prompt and the dense model's answer so far, its best token is the dense model's."""
    prompts = [tokenizer.encode(prompt) for prompt in upcycle.PROMPTS[:4]]
    answers = upcycle.greedy(dense, prompts, NUM_TOKENS)
    texts = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    longest = max(map(len, texts))
    padded = TransformerInput(torch.tensor([text + [0] * (longest - len(text)) for text in texts]))
    got = moe(padded).logits
    torch.testing.assert_close(got, dense(padded).logits, rtol=0, atol=1e-4)
    for row, prompt, answer in zip(got, prompts, answers, strict=True):
        assert row[len(prompt) - 1 :][:NUM_TOKENS].argmax(-1).tolist() == answer


def test_every_expert_of_every_layer_works_and_not_all_the_same(moe, inputs):
    use = upcycle.expert_use(moe, inputs).float()
    assert use.shape == (30, 8)
    assert use.min() > 0
    assert (use.max(1).values > 2 * use.min(1).values).all()


def test_the_best_score_is_exactly_one(moe, inputs):
    for x, block in zip(inputs, moe.blocks(), strict=True):
        assert ((x @ block.feed_forward.router_DE).amax(-1).sigmoid() == 1).all()


def test_mixed_up_experts_show(moe, tokenizer):
    inputs = TransformerInput(torch.tensor([tokenizer.encode(upcycle.PROMPTS[0])]))
    with torch.no_grad():
        expected = moe(inputs).logits
        w2 = moe.layers[0].feed_forward.experts.w2
        w2.copy_(w2.roll(1, 0))
        mixed = moe(inputs).logits
        w2.copy_(w2.roll(-1, 0))
    assert (mixed - expected).abs().max() > 0.1


@pytest.fixture(scope="module")
def folder(source, dense, tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2-moe")
    parts = upcycle.upcycled(dense, upcycle.calibration_tokens(tokenizer), seed=0)
    upcycle.write(folder, upcycle.moe_args(open_checkpoint(source).args), parts, torch.float32)
    upcycle.write_tokenizer(folder, tokenizer)
    return folder


async def answers(url: str, model: str, prompts: list[str]) -> list[list[int]]:
    """The tokens of prompts and greedy answers, all asked for at once."""

    async def ask(client: httpx.AsyncClient, prompt: str) -> list[int]:
        fields = {"max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
        response = await client.post("/v1/completions", json={"model": model, "prompt": prompt, **fields})
        choice = response.raise_for_status().json()["choices"][0]
        assert len(choice["token_ids"]) == NUM_TOKENS
        return choice["prompt_token_ids"] + choice["token_ids"]

    async with httpx.AsyncClient(base_url=url, timeout=240) as client:
        return list(await asyncio.gather(*(ask(client, prompt) for prompt in prompts)))


async def test_over_http_it_speaks_token_for_token_like_the_dense_model(source, folder, moe, start_stack):
    """Of 32 prompts about 32 subjects. Prints which experts their tokens went to."""
    sections = [text for text in real_text().split("\n\n") if len(text) > 200]
    prompts = [text[:150] for text in sections[:: len(sections) // NUM_PROMPTS][:NUM_PROMPTS]]
    engine = {"dtype": "float32", "max_model_len": 512, "kv_cache_memory": "256MiB"}
    models = {"dense": source, "moe": folder}
    url = start_stack({"models": [{"id": id, "path": str(path), "engine": engine} for id, path in models.items()]})
    expected, got = [await answers(url, model, prompts) for model in models]
    assert len(got) == NUM_PROMPTS
    assert got == expected
    seen = [upcycle.inputs_of_feed_forwards(moe, torch.tensor([tokens])) for tokens in got]
    use = upcycle.expert_use(moe, [torch.cat(layer) for layer in zip(*seen, strict=True)])
    Console().print(upcycle.use_table(use))
    assert use.all()


def test_the_folder_is_opened_by_moray_and_by_transformers(tmp_path):
    torch.manual_seed(1)
    dense = LLM(ModelArgs(dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=64, norm_eps=1e-5, max_seq_len=64))
    calibration = torch.randint(0, 64, (4, 32))
    args = upcycle.moe_args(dense.args)
    upcycle.write(tmp_path, args, upcycle.upcycled(dense, calibration, seed=0), torch.float32)
    checkpoint = open_checkpoint(tmp_path)
    model = LLM(checkpoint.args, initialize=False)
    checkpoint.load_into(model)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        expected = dense(TransformerInput(calibration)).logits
        torch.testing.assert_close(model(TransformerInput(calibration)).logits, expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(theirs(calibration).logits, expected, rtol=0, atol=1e-5)


def test_the_tokenizer_comes_along(tokenizer, tmp_path):
    upcycle.write_tokenizer(tmp_path, tokenizer)
    written = open_tokenizer(str(tmp_path))
    text = "<|im_start|>user\nSay 1234 in Größe!<|im_end|>\n"
    assert written.encode(text) == tokenizer.encode(text)
    assert written.chat_template == tokenizer.chat_template
    assert written.eos_token_ids == tokenizer.eos_token_ids
    assert written.special_tokens == tokenizer.special_tokens
    assert written.special_ids == tokenizer.special_ids
