"""Meta's own image preprocessing and chat format as the oracle."""

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

LLAMA4 = "llama_models.llama4"


class Resize:
    """Of a PIL image torchvision asks Pillow."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.resize(self.size[::-1], Image.Resampling.BILINEAR)


def resize(image: Image.Image, size: tuple[int, int], interpolation: str) -> Image.Image:
    assert interpolation == "bilinear"
    return Resize(size)(image)


class ToTensor:
    def __call__(self, image: Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)


class Normalize:
    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], inplace: bool) -> None:
        self.mean, self.std = (torch.tensor(value)[:, None, None] for value in (mean, std))

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.sub_(self.mean).div_(self.std)


class Compose:
    def __init__(self, transforms: list[Any]) -> None:
        self.transforms = transforms

    def __call__(self, value: Any) -> Any:
        for transform in self.transforms:
            value = transform(value)
        return value


def stand_in() -> dict[str, ModuleType]:
    """What Meta's module takes of torchvision, which does not load beside the CPU torch: four functions."""
    names = ("torchvision", "torchvision.transforms", "torchvision.transforms.functional")
    modules = {name: ModuleType(name) for name in names}
    functional, transforms = modules[names[2]], modules[names[1]]
    functional.resize = resize
    for part in (Resize, ToTensor, Normalize, Compose):
        setattr(transforms, part.__name__, part)
    transforms.InterpolationMode = type("InterpolationMode", (), {"BILINEAR": "bilinear"})
    transforms.functional = functional
    return modules


@pytest.fixture(scope="session")
def chat_format() -> Iterator[ModuleType]:
    """`llama_models.llama4.chat_format`, over torchvision where that is installed, over the stand-in elsewhere."""
    if importlib.util.find_spec("llama_models") is None:
        pytest.skip("llama-models is a development dependency")
    is_real = importlib.util.find_spec("torchvision") is not None
    modules = {"torchvision._meta_registrations": ModuleType("empty")} if is_real else stand_in()
    with pytest.MonkeyPatch.context() as patch:
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        patch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)  # the import switches it on
        yield importlib.import_module(f"{LLAMA4}.chat_format")
    for name in ("chat_format", "preprocess"):
        sys.modules.pop(f"{LLAMA4}.{name}", None)


@pytest.fixture(scope="session")
def llama4_tokenizer() -> Path:
    spec = importlib.util.find_spec("llama_models")
    if spec is None or spec.origin is None:
        pytest.skip("llama-models is a development dependency")
    return Path(spec.origin).parent / "llama4" / "tokenizer.model"
