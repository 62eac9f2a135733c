"""tiny-scout reads digits it has never seen, its experts do the work, and its training trains all of it."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny_scout import digits
from tiny_scout.answering import answers, load
from tiny_scout.architecture import tiny_scout
from tiny_scout.checkpoint import save
from tiny_scout.conversation import Batch, image_settings, model_input
from tiny_scout.dialogues import IMAGE, Dialogue, Turn, about_one, reading
from tiny_scout.experts import expert_use, freeze_router, moe_layers, shuffle_experts, silence_experts
from tiny_scout.held_out import accuracy, singles, sums
from tiny_scout.optimization import Optimizer
from tiny_scout.training import Settings, losses, training_batches
from transformers import Llama4ForConditionalGeneration

from deployments.front.images.prepare import prepare_bytes
from model import LLM
from model.checkpoint import open_checkpoint

CHECKPOINT = Path(__file__).parents[2] / "examples" / "tiny-scout" / "checkpoint"
SAMPLE = digits.HELD_OUT[:120]


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def loaded():
    """The model, and how to talk to it. Loaded anew for each test: some break it."""
    return load(CHECKPOINT)


def prompt_of(model, chat, dialogue, indices):
    images = [prepare_bytes(digits.png(i), image_settings(model)) for i in indices]
    return chat.conversation(dialogue, images, with_answers=False)


def test_the_split_leaves_held_out_digits_alone():
    assert not set(digits.TRAIN) & set(digits.HELD_OUT)
    assert len(digits.TRAIN) + len(digits.HELD_OUT) == 1797
    assert set(digits.LABELS[SAMPLE]) == set(range(10))


def test_the_checkpoint_is_small():
    assert sum(file.stat().st_size for file in CHECKPOINT.iterdir()) < 4e6


def test_it_reads_digits(loaded):
    model, chat = loaded
    assert accuracy(model, chat, singles(SAMPLE)) >= 0.97


def test_it_adds_two_digits(loaded):
    model, chat = loaded
    assert accuracy(model, chat, sums(SAMPLE)) >= 0.90


ABLATIONS = {
    "shuffled": [partial(shuffle_experts, places=places) for places in range(1, 8)],
    "frozen": [partial(freeze_router, expert=expert) for expert in range(8)],
    "silent": [silence_experts],
}


@pytest.mark.parametrize("ablations", ABLATIONS.values(), ids=ABLATIONS)
def test_without_its_experts_it_is_lost(ablations):
    """Sums always. Single digits in the mean: two of the 15 ways to choose the wrong expert still read most of them."""
    read = []
    for ablate in ablations:
        model, chat = load(CHECKPOINT)
        ablate(model)
        read.append(accuracy(model, chat, singles(SAMPLE[:60])))
        assert accuracy(model, chat, sums(SAMPLE[:60])) < 0.4
    assert sum(read) / len(read) < 0.3, read
    assert sorted(read)[len(read) // 2] < 0.2, read


def test_every_expert_of_every_layer_is_used(loaded):
    model, chat = loaded
    with expert_use(model) as counts:
        accuracy(model, chat, sums(SAMPLE[:60]))
    assert counts.shape == (4, 8)
    shares = counts / counts.sum(dim=1, keepdim=True)
    assert shares.min() > 0.01, shares


def test_it_remembers_the_images_of_a_conversation(loaded):
    """The sum asked for in a third turn, of digits shown in the first and second."""
    model, chat = loaded
    by_digit = {int(digits.LABELS[i]): i for i in SAMPLE}
    dialogue = Dialogue(
        (
            Turn((IMAGE, "What digit is this?"), reading(7)),
            Turn((IMAGE, "And this one?"), reading(5)),
            Turn(("What is their sum?",), ""),
        ),
        (7, 5),
    )
    prompt = prompt_of(model, chat, dialogue, [by_digit[7], by_digit[5]])
    assert len(prompt.ids) > model.args.attention_chunk_size
    assert answers(model, chat, [prompt]) == ["Seven plus five is twelve."]


def test_cached_decode_equals_one_prefill(loaded):
    model, chat = loaded
    indices = list(SAMPLE[:2])
    dialogue, _ = sums(indices)[0]
    images = [prepare_bytes(digits.png(i), image_settings(model)) for i in indices]
    inputs = model_input(model, Batch.of([chat.conversation(dialogue, images)], chat.image_tokens.patch))
    with torch.no_grad():
        whole = model(inputs).logits
    cached = model(inputs, inference=True).logits
    torch.testing.assert_close(cached, whole, rtol=1e-5, atol=1e-5)


def test_transformers_computes_the_same(loaded):
    model, chat = loaded
    theirs = Llama4ForConditionalGeneration.from_pretrained(
        CHECKPOINT, dtype=torch.float32, attn_implementation="eager"
    )
    index = int(SAMPLE[0])
    prompt = prompt_of(model, chat, about_one(int(digits.LABELS[index])), [index])
    batch = Batch.of([prompt], chat.image_tokens.patch)
    with torch.no_grad():
        ours = model(model_input(model, batch)).logits
        expected = theirs(input_ids=batch.tokens, pixel_values=batch.pixels[0][0]).logits
    scale = expected.abs().max()
    torch.testing.assert_close(ours / scale, expected / scale, rtol=1e-5, atol=1e-5)


def test_the_chat_format_is_llama_4s(loaded):
    model, chat = loaded
    index = int(SAMPLE[0])
    ids = prompt_of(model, chat, about_one(0), [index]).ids
    assert chat.tokenizer.decode(ids, skip_special_tokens=False) == (
        "<|begin_of_text|><|header_start|>user<|header_end|>\n\n<|image_start|><|image|><|patch|><|patch|><|patch|>"
        "<|patch|><|image_end|>What digit is this?<|eot|><|header_start|>assistant<|header_end|>\n\n"
    )


def test_any_text_survives_the_tokenizer(loaded):
    _, chat = loaded
    text = "  Größe: 東京 🐟\n\nWhat?\t "
    assert chat.tokenizer.decode(chat.tokenizer.encode(text, add_special_tokens=False)) == text


def test_one_step_of_training_lowers_the_loss_and_moves_everything(loaded):
    """Of a new model: gradients reach the image encoder, the routers and every expert through `LLM.forward`."""
    _, chat = loaded
    torch.manual_seed(0)
    model = LLM(tiny_scout(chat.tokenizer.vocab_size))
    batch = next(training_batches(model, chat, Settings(batch_size=128, only_one=0), seed=0))
    before, _, balance = losses(model, batch)
    optimizer = Optimizer(model.parameters(), learning_rate=5e-2, steps=1000)
    optimizer.step(before + 0.02 * balance)
    still = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not still
    for moe in moe_layers(model):
        assert moe.experts.w1.grad.flatten(1).any(dim=1).all()
    after, _, _ = losses(model, batch)
    assert after < before - 0.05


def test_what_is_saved_is_what_was_trained(loaded, tmp_path):
    _, chat = loaded
    model = LLM(tiny_scout(chat.tokenizer.vocab_size))
    save(model, tmp_path, chat.image_tokens.patch, torch.float32)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.args == model.args
    again = LLM(checkpoint.args, initialize=False)
    checkpoint.load_into(again)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert json.loads((tmp_path / "config.json").read_text())["image_token_index"] == chat.image_tokens.patch
