"""Prompts with images against Meta's ChatFormat, with the real tokenizer of Llama 4."""

import pytest

from deployments.front.images import ImageError, ImageSettings, ImageTokens, place_images
from deployments.front.images.prepare import prepare_bytes
from deployments.front.images.tokens import image_sequence
from deployments.front.tokenizer import Tokenizer, open_tokenizer
from tests.deployments.front.images.pictures import encoded, picture

TILE, PATCH = 56, 14
SETTINGS = ImageSettings(tile_size=TILE, tokens_per_tile=4)

ONE, WIDE, TALL = (encoded(picture("RGB", *size)) for size in ((50, 50), (150, 60), (60, 220)))

DIALOGUES = [
    [("user", [ONE, "What is this?"])],
    [("user", ["Look: ", WIDE, " What do you see?"])],
    [("user", [TALL, WIDE, ONE, "Which of these is the largest?"])],
    [("user", ["First ", ONE, " then ", WIDE, " last ", TALL])],
    [("user", [TALL])],
    [
        ("system", "You describe images."),
        ("user", [WIDE, "Describe it in two sentences.\n\nBe brief."]),
        ("assistant", "A gradient. Noise."),
        ("user", ["And this?", ONE]),
        ("assistant", "Smaller."),
        ("user", "Why? 😀"),
    ],
    [("user", "Take a photograph"), ("assistant", "Click."), ("tool", [TALL, "12:00"]), ("user", "What is on it?")],
    [("user", "No image at all")],
]


@pytest.fixture(scope="module")
def tokenizer(llama4_tokenizer) -> Tokenizer:
    return open_tokenizer(str(llama4_tokenizer))


@pytest.fixture(scope="module")
def tokens(tokenizer) -> ImageTokens:
    return ImageTokens.of(tokenizer)


@pytest.fixture(scope="module")
def theirs(chat_format, llama4_tokenizer):
    from llama_models.llama4.args import Size, VisionArgs
    from llama_models.llama4.tokenizer import Tokenizer as Theirs

    vision = VisionArgs(
        image_size=Size(height=TILE, width=TILE), patch_size=Size(height=PATCH, width=PATCH), dim=8, n_layers=1,
        n_heads=1, mlp_ratio=4.0, output_dim=8, pixel_shuffle_ratio=0.5,
    )  # fmt: skip
    return chat_format.ChatFormat(Theirs(llama4_tokenizer), vision)


def rendered(dialogue) -> str:
    """As Llama 4's chat template writes it: `<|image|>` for an image."""
    text = "<|begin_of_text|>"
    for role, content in dialogue:
        parts = [content] if isinstance(content, str) else content
        shown = "".join("<|image|>" if isinstance(part, bytes) else part for part in parts)
        name, end = ("ipython", "<|eom|>") if role == "tool" else (role, "<|eot|>")
        text += f"<|header_start|>{name}<|header_end|>\n\n{shown}{end}"
    return text + "<|header_start|>assistant<|header_end|>\n\n"


@pytest.mark.parametrize("dialogue", DIALOGUES, ids=range(len(DIALOGUES)))
def test_prompts_equal_metas(dialogue, theirs, tokenizer, tokens):
    from llama_models.datatypes import RawMediaItem, RawMessage, RawTextItem

    def item(part):
        return RawMediaItem(data=part) if isinstance(part, bytes) else RawTextItem(text=part)

    raw = [
        RawMessage(
            role=role,
            content=content if isinstance(content, str) else [item(part) for part in content],
            call_id="1",
            tool_name="camera",
        )
        for role, content in dialogue
    ]
    expected = theirs.encode_dialog_prompt(raw)
    data = [part for _, content in dialogue if not isinstance(content, str) for part in content]
    images = [prepare_bytes(part, SETTINGS) for part in data if isinstance(part, bytes)]
    prompt = tokenizer.encode(rendered(dialogue), add_special_tokens=False)
    ids, places = place_images(prompt, images, tokens, SETTINGS.tokens_per_tile)
    assert ids == expected.tokens
    assert [len(place.image.tiles) for place in places] == [len(image) for image in expected.images or []]
    patches = [position for place in places for position in place.patches]
    assert patches == [position for position, token in enumerate(ids) if token == tokens.patch]
    assert [len(place.patches) for place in places] == [4 * len(image.tiles) for image in images]


def test_a_sequence_spelled_out(tokenizer, tokens):
    image = prepare_bytes(encoded(picture("RGB", 100, 100)), SETTINGS)
    assert (image.rows, image.columns) == (2, 2)
    text = tokenizer.decode(image_sequence(image, tokens, 1), skip_special_tokens=False)
    row = "<|patch|><|tile_x_separator|><|patch|><|tile_y_separator|>"
    assert text == f"<|image_start|>{row}{row}<|image|><|patch|><|image_end|>"


def test_an_image_that_the_text_only_names_is_refused(tokenizer, tokens):
    prompt = tokenizer.encode("<|image|> and <|image|>", add_special_tokens=False)
    with pytest.raises(ImageError, match="the conversation has 1 images, but places for 2"):
        place_images(prompt, [prepare_bytes(ONE, SETTINGS)], tokens, 4)


def test_a_tokenizer_without_image_tokens():
    class Bytes:
        def encode(self, text, **_):
            return list(text.encode())

    with pytest.raises(ValueError, match=r"no token <\|image_start\|>"):
        ImageTokens.of(Bytes())
