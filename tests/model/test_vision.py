"""Vision against Meta's `llama-models` on configurations drawn at random, and by its own properties."""

import random
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from model import LLM, ModelArgs, TransformerInput
from model.args import MoEArgs, Size, VisionArgs
from model.datatypes import MaskedEmbedding, PagedBatch
from model.kernels import cpu
from model.kv_cache import PagedCache
from model.packed import PackedCache, can_pack, pack
from model.vision import VisionEmbeddings
from model.vision.embedding import pixel_shuffle
from model.vision.encoder import VisionEncoder
from model.vision.pixels import normalize_pixels
from tests.model.paging import Pages


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    pass


@pytest.fixture
def meta(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = pytest.importorskip("llama_models.llama4.model", reason="llama-models is a development dependency")
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self, *_, **__: self)
    return module


def draw_vision(seed: int) -> VisionArgs:
    rng = random.Random(seed)
    heads, shuffle = rng.choice([1, 2, 3]), rng.choice([1, 2, 2, 4])
    patch, across = rng.choice([2, 4, 7]), shuffle * rng.choice([1, 2, 3])
    return VisionArgs(
        image_size=Size(height=patch * across, width=patch * across), patch_size=Size(height=patch, width=patch),
        dim=heads * rng.choice([8, 16, 24]) * 2, n_heads=heads, n_layers=rng.choice([1, 2, 3]),
        mlp_ratio=rng.choice([2.0, 4.0, 1.5]), output_dim=rng.choice([16, 40]), pixel_shuffle_ratio=1 / shuffle,
    )  # fmt: skip


def draw(seed: int) -> ModelArgs:
    """A small vision model; text features on and off at random."""
    rng = random.Random(seed)
    moe = MoEArgs(num_experts=4, top_k=rng.choice([1, 2]), interleave_moe_layer_step=rng.choice([1, 2]))
    return ModelArgs(
        dim=64, n_layers=2, n_heads=4, n_kv_heads=rng.choice([1, 2, 4]), vocab_size=96, multiple_of=16,
        ffn_dim_multiplier=1.0, attention_chunk_size=rng.choice([None, 8]), nope_layer_interval=rng.choice([None, 2]),
        use_qk_norm=rng.random() < 0.5, max_seq_len=256, max_batch_size=3, vision_args=draw_vision(seed),
        moe_args=rng.choice([None, moe]),
    )  # fmt: skip


@torch.no_grad()
def enlarge(model: nn.Module) -> None:
    """Weights at random, large enough to make features of order one and every part of the model count."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.uniform_(0.5, 1.5) if "ln_" in name or "norm" in name else parameter.normal_()
        else:
            width = parameter.shape[-2] if "experts.w" in name or "router" in name else parameter.shape[-1]
            parameter.normal_(std=1.5 / width**0.5)


def reference(args: ModelArgs, meta: ModuleType) -> nn.Module:
    from llama_models.llama4 import args as meta_args

    fields = args.model_dump(include=set(meta_args.ModelArgs.model_fields) - {"moe_args", "head_dim"})
    if args.moe_args is not None:
        fields["moe_args"] = args.moe_args.model_dump(include=set(meta_args.MoEArgs.model_fields))
    return meta.Transformer(meta_args.ModelArgs(**fields)).float()  # its encoder casts itself to bfloat16


def images_of(args: VisionArgs, tiles: list[list[int]]) -> list[list[torch.Tensor]]:
    """For every row, images of so many tiles."""
    size = (3, args.image_size.height, args.image_size.width)
    return [[torch.rand(count, *size) * 2 - 1 for count in row] for row in tiles]


def tokens_with_places(args: ModelArgs, tiles: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Random tokens and a mask [batch, length, 1] with places for the images, text around each of them."""
    rows = []
    for images in tiles:
        row = [False, False]
        for count in images:
            row += [True] * (count * args.vision_args.tokens_per_tile) + [False]
        rows.append(row)
    length = max(map(len, rows)) + 2
    mask = torch.tensor([row + [False] * (length - len(row)) for row in rows])[..., None]
    return torch.randint(0, args.vocab_size, mask.shape[:2]), mask


def assert_equal(got: torch.Tensor, expected: torch.Tensor, what: object) -> None:
    scale = expected.abs().max()
    torch.testing.assert_close(got / scale, expected / scale, rtol=1e-5, atol=1e-5, msg=lambda m: f"{what!r}\n{m}")


TILES = [[1, 2], [], [1]]


@pytest.mark.parametrize("seed", range(24))
def test_embeddings_and_logits_equal_metas(seed, meta):
    args = draw(seed)
    torch.manual_seed(seed)
    model = LLM(args)
    enlarge(model)
    theirs = reference(args, meta)
    theirs.load_state_dict(model.state_dict())  # strict: Meta's names, all of them
    images = images_of(args.vision_args, TILES)
    tokens, mask = tokens_with_places(args, TILES)

    # Meta's takes rows without images only where others have some; its encoder wants [tiles, 1, 3, height, width].
    flat = torch.cat([image for row in images for image in row])
    expected = theirs.vision_embeddings.vision_encoder(flat[:, None])
    assert_equal(model.vision_embeddings.vision_encoder(flat), expected, args)

    h = model.tok_embeddings(tokens)
    expected = theirs.vision_embeddings(images, mask, h)
    got = model.vision_embeddings(images, mask, h)
    assert_equal(got, expected, args)

    from llama_models.llama4 import datatypes

    seen = datatypes.MaskedEmbedding(embedding=expected, mask=mask)
    logits = theirs(datatypes.TransformerInput(tokens=tokens, tokens_position=0, image_embedding=seen)).logits
    assert_equal(model(TransformerInput(tokens, 0, MaskedEmbedding(got, mask))).logits, logits, args)


def test_a_tile_that_is_no_square_equals_metas(meta):
    from llama_models.llama4.vision.encoder import VisionEncoder as Theirs

    LLM(draw(0))  # sets up the model-parallel group
    args = VisionArgs(
        image_size=Size(height=8, width=24), patch_size=Size(height=4, width=3), dim=48, n_layers=2, n_heads=3,
        mlp_ratio=4.0, output_dim=8, pixel_shuffle_ratio=0.5,
    )  # fmt: skip
    ours, theirs = VisionEncoder(args), Theirs((8, 24), (4, 3), 48, 2, 3, 4.0)
    enlarge(ours)
    theirs.load_state_dict(ours.state_dict())
    pixels = torch.randn(2, 3, 8, 24)
    assert_equal(ours(pixels), theirs(pixels[:, None]), args)


def test_published_sizes_have_metas_names_and_shapes(meta):
    """Llama 4 Scout's encoder, cut to two layers."""
    from llama_models.llama4 import args as meta_args
    from llama_models.llama4.vision.embedding import VisionEmbeddings as Theirs

    args = VisionArgs(
        image_size=Size(height=336, width=336), patch_size=Size(height=14, width=14), dim=1408, n_layers=2,
        n_heads=16, mlp_ratio=4.0, output_dim=4096, pixel_shuffle_ratio=0.5,
    )  # fmt: skip
    LLM(draw(0))  # sets up the model-parallel group
    with torch.device("meta"):
        ours = VisionEmbeddings(args)
    theirs = Theirs(meta_args.VisionArgs(**args.model_dump()))
    shapes = {name: value.shape for name, value in theirs.state_dict().items()}
    assert {name: value.shape for name, value in ours.state_dict().items()} == shapes
    assert args.tokens_per_tile == 144


@pytest.mark.filterwarnings("ignore:Default grid_sample")
@pytest.mark.parametrize("seed", range(4))
def test_positions_from_before_the_text_model_are_resampled_as_metas(seed, meta):
    from llama_models.llama4.vision.encoder import VisionEncoder as Theirs

    LLM(draw(0))
    args = draw_vision(seed)
    size, patch = args.image_size, args.patch_size
    theirs = Theirs((size.height, size.width), (patch.height, patch.width), args.dim, args.n_layers, args.n_heads, 4.0)
    ours = VisionEncoder(args)
    old = {"positional_embedding": torch.randn(ours.positional_embedding_vlm.shape)}
    ours.load_state_dict(dict(old), strict=False)
    theirs.load_state_dict(dict(old), strict=False)
    torch.testing.assert_close(ours.positional_embedding_vlm, theirs.positional_embedding_vlm)


def test_pixel_shuffle_puts_the_patches_of_a_square_side_by_side():
    patches = torch.arange(2 * 4).view(1, 8, 1)  # 2 rows, 4 columns
    assert pixel_shuffle(patches, (2, 4), 2).tolist() == [[[0, 1, 4, 5], [2, 3, 6, 7]]]


@pytest.fixture
def model() -> LLM:
    torch.manual_seed(0)
    return LLM(draw(5))


def test_gradients_flow_through_every_parameter(model):
    tokens, mask = tokens_with_places(model.args, TILES)
    embedding = model.vision_embeddings(images_of(model.args.vision_args, TILES), mask, model.tok_embeddings(tokens))
    model(TransformerInput(tokens, 0, MaskedEmbedding(embedding, mask))).logits.logsumexp(-1).sum().backward()
    without = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    assert {name for name in without if "vision" in name} == set()


def test_paged_steps_with_an_image_equal_the_plain_forward(model):
    """The image's tokens come in two steps, the first of them beside another sequence's."""
    args = model.args.vision_args
    tiles = torch.randint(0, 256, (2, 3, args.image_size.height, args.image_size.width), dtype=torch.uint8)
    tokens, mask = tokens_with_places(model.args, [[2], []])
    seen = model.vision_embeddings([[normalize_pixels(tiles)], []], mask, model.tok_embeddings(tokens))
    expected = model(TransformerInput(tokens, 0, MaskedEmbedding(seen, mask))).logits

    rows = model.embed_tiles(tiles).flatten(0, 1)
    first, cut = 2, 2 + len(rows) // 2  # where the image begins, where the first step ends
    length = tokens.shape[1]
    pages = Pages(model.args, sequences=2, length=length, block_size=4)
    cache = PagedCache(model.args, model.args.kv_heads, pages.num_blocks, 4, torch.float32)
    pieces = [(1, 0, tokens[1, :3]), (0, 0, tokens[0, :cut])]
    logits = [model.step(with_images(pages.batch(pieces), range(3 + first, 3 + cut), rows[: cut - first]), cache)]
    rest = with_images(pages.batch([(0, cut, tokens[0, cut:])]), range(first + len(rows) - cut), rows[cut - first :])
    logits.append(model.step(rest, cache))
    wanted = torch.cat([expected[1, :3], expected[0]])
    torch.testing.assert_close(torch.cat(logits), wanted, rtol=1e-5, atol=1e-5)


def with_images(batch: PagedBatch, image_rows: range, embeddings: torch.Tensor) -> PagedBatch:
    return replace(batch, image_rows=torch.tensor(image_rows), image_embeddings=embeddings)


@pytest.mark.skipif(not cpu.available(), reason="needs a CPU with AVX512-BF16 and a C++ compiler")
def test_a_packed_model_sees_images():
    torch.manual_seed(0)
    model = LLM(draw(5).model_copy(update={"moe_args": None, "ffn_hidden_dim": 160})).requires_grad_(False)
    args = model.args.vision_args
    tiles = torch.randint(0, 256, (1, 3, args.image_size.height, args.image_size.width), dtype=torch.uint8)
    tokens, mask = tokens_with_places(model.args, [[1]])
    seen = model.vision_embeddings([[normalize_pixels(tiles)]], mask, model.tok_embeddings(tokens))
    expected = model(TransformerInput(tokens, 0, MaskedEmbedding(seen, mask))).logits[0]

    model.bfloat16()
    assert can_pack(model.args, torch.bfloat16, 16)
    rows = model.embed_tiles(tiles).flatten(0, 1)
    pack(model)
    pages = Pages(model.args, sequences=1, length=tokens.shape[1], block_size=16)
    cache = PackedCache(model.args, model.args.kv_heads, pages.num_blocks, 16, torch.bfloat16)
    batch = pages.batch([(0, 0, tokens[0])])
    plain = model.step(batch, cache)
    got = model.step(with_images(batch, range(2, 2 + len(rows)), rows), cache)
    scale = expected.abs().max()
    torch.testing.assert_close(got / scale, expected / scale, rtol=0, atol=0.05)
    assert (plain - expected).abs().max() > 0.2 * scale  # without the image it is another prompt


def test_rotary_tables_stay_float32_in_a_bfloat16_model(model):
    cosine = model.vision_embeddings.vision_encoder.rope.cosine.clone()
    model.bfloat16()
    torch.testing.assert_close(model.vision_embeddings.vision_encoder.rope.cosine, cosine, rtol=0, atol=0)
    size = model.args.vision_args.image_size
    tiles = torch.zeros(1, 3, size.height, size.width, dtype=torch.uint8)
    assert model.embed_tiles(tiles).dtype is torch.bfloat16


def test_a_batch_without_images_is_zeros(model):
    tokens, mask = tokens_with_places(model.args, [[], []])
    got = model.vision_embeddings([[], []], mask, model.tok_embeddings(tokens))
    assert got.shape == (*tokens.shape, model.args.vision_args.output_dim)
    assert not got.any()


def test_images_that_do_not_fit_their_places_are_an_error(model):
    tokens, mask = tokens_with_places(model.args, [[1], [1]])
    h, made = model.tok_embeddings(tokens), model.args.vision_args.tokens_per_tile
    with pytest.raises(ValueError, match=f"row 0 has {made} image tokens, its images make {2 * made}"):
        model.vision_embeddings(images_of(model.args.vision_args, [[2], []]), mask, h)
    with pytest.raises(ValueError, match="images of 1 rows for a batch of 2"):
        model.vision_embeddings(images_of(model.args.vision_args, [[2]]), mask, h)


def test_tiles_of_another_size_are_an_error(model):
    with pytest.raises(ValueError, match=r"tiles must be \[tiles, 3, .*got \[1, 3, 5, 5\]"):
        model.embed_tiles(torch.zeros(1, 3, 5, 5, dtype=torch.uint8))
    with pytest.raises(TypeError, match="pixels must be uint8"):
        model.embed_tiles(torch.zeros(1, 3, 5, 5))


def test_a_text_model_refuses_images():
    text = LLM(draw(5).model_copy(update={"vision_args": None}))
    assert not any("vision" in name for name in text.state_dict())
    with pytest.raises(ValueError, match="sees no images"):
        text.embed_tiles(torch.zeros(1, 3, 4, 4, dtype=torch.uint8))
    seen = MaskedEmbedding(torch.zeros(1, 2, 8), torch.zeros(1, 2, 1, dtype=torch.bool))
    with pytest.raises(ValueError, match="sees no images"):
        text(TransformerInput(torch.zeros(1, 2, dtype=torch.int64), 0, seen))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": Size(height=3, width=4)}, r"image_size.height \(16\) must be a multiple of"),
        ({"patch_size": Size(height=4, width=16)}, r"width of 1 patches must be a multiple"),
        ({"pixel_shuffle_ratio": 0.4}, "must be 1 over a whole number"),
        ({"n_heads": 3}, r"dim \(32\) must be a multiple of 4 \* n_heads \(12\)"),
        ({"patchsize": 3}, "patchsize"),
    ],
)
def test_vision_args_that_do_not_fit(changes, message):
    fields = dict(
        image_size=Size(height=16, width=16), patch_size=Size(height=4, width=4), dim=32, n_layers=1, n_heads=2,
        mlp_ratio=4.0, output_dim=8, pixel_shuffle_ratio=0.5,
    )  # fmt: skip
    VisionArgs(**fields)
    with pytest.raises(ValidationError, match=message):
        VisionArgs(**(fields | changes))
