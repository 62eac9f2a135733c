import gguf
import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from model.checkpoint.gguf_file import StoredTensor
from model.checkpoint.quantized import SUPPORTED_TYPES, stored_source

ROWS, COLUMNS = 6, 512


def _stored(kind: GGMLQuantizationType, shape: tuple[int, ...] = (ROWS, COLUMNS)) -> StoredTensor:
    """Quantized normal values; where the library only dequantizes, blocks of random bits with small finite scales."""
    rng = np.random.default_rng(kind)
    values = rng.normal(size=shape).astype(np.float32)
    try:
        packed = gguf.quantize(values, kind).view(np.uint8)
    except NotImplementedError:
        size, size_bytes = GGML_QUANT_SIZES[kind]
        # A float16 of two bytes below 0x78 is finite, wherever in the block the scales are.
        packed = rng.integers(0, 0x78, (*shape[:-1], shape[-1] // size * size_bytes), dtype=np.uint8)
    return StoredTensor(shape, kind, packed)


def _reference(stored: StoredTensor) -> torch.Tensor:
    packed = stored.data
    if stored.type in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
        packed = packed.view(np.float32 if stored.type == GGMLQuantizationType.F32 else np.float16)
    return torch.tensor(gguf.dequantize(packed, stored.type))


@pytest.mark.parametrize("kind", sorted(SUPPORTED_TYPES), ids=lambda kind: kind.name)
@pytest.mark.parametrize(
    "region",
    [(slice(0, ROWS), slice(0, COLUMNS)), (slice(2, 5), slice(0, COLUMNS)), (slice(0, ROWS), slice(100, 301))],
    ids=["whole", "rows", "columns across blocks"],
)
def test_any_region_is_what_the_gguf_library_gives(kind, region):
    stored = _stored(kind)
    source = stored_source(stored)
    assert source.shape == (ROWS, COLUMNS)
    values = source.read(region).float()
    assert values.isfinite().all()
    assert values.std() > 0
    assert torch.equal(values, _reference(stored)[region])


@pytest.mark.parametrize("kind", [GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q6_K], ids=lambda kind: kind.name)
def test_tensors_of_three_dimensions(kind):
    stored = _stored(kind, (3, 4, 256))
    region = (slice(1, 3), slice(0, 2), slice(7, 200))
    assert torch.equal(stored_source(stored).read(region), _reference(stored)[region])


def test_extreme_bytes_of_the_fast_types_are_what_the_gguf_library_gives():
    """All nibbles and signs, which normal values may not reach."""
    for kind in (GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q4_1):
        size_bytes = GGML_QUANT_SIZES[kind][1]
        packed = np.random.default_rng(1).integers(0, 256, (64, size_bytes), dtype=np.uint8)
        packed[:, 1:4:2] &= 0x3F  # finite scales
        stored = StoredTensor((64, 32), kind, packed)
        assert torch.equal(stored_source(stored).read((slice(0, 64), slice(0, 32))), _reference(stored))
