"""The first stage: the image encoder learns to tell digits apart, before it meets the text model.

Llama 4's encoder was trained before it met its text model, too. Without this, the text model finds
nothing worth looking at in images for several hundred steps.
"""

import random
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from deployments.front.images.tiles import cut
from model import LLM
from model.vision.pixels import normalize_pixels
from tiny_scout import digits
from tiny_scout.conversation import image_settings
from tiny_scout.optimization import Optimizer, ProgressBar

STEPS = 500
BATCH_SIZE = 64
LEARNING_RATE = 2e-3


def train_encoder(model: LLM, console: Console, seed: int, steps: int = STEPS) -> None:
    """Trains `vision_embeddings` and `vision_projection`, with a linear classifier that is thrown away afterwards."""
    assert model.args.vision_args is not None
    classifier = nn.Linear(model.args.dim * model.args.vision_args.tokens_per_tile, 10)
    sight = [*model.vision_embeddings.parameters(), *model.vision_projection.parameters()]
    optimizer = Optimizer([*sight, *classifier.parameters()], LEARNING_RATE, steps)
    tiles = _tiles(model, random.Random(seed))
    with ProgressBar("image encoder", steps, console) as progress:
        for _ in range(steps):
            pixels, labels = next(tiles)
            seen = model.vision_projection(model.vision_embeddings.embed(pixels))
            logits = classifier(F.layer_norm(seen, seen.shape[-1:]).flatten(1))
            loss = F.cross_entropy(logits, labels)
            optimizer.step(loss)
            progress.advance(loss=loss.detach(), right=(logits.argmax(dim=-1) == labels).float().mean())


def _tiles(model: LLM, rng: random.Random) -> Iterator[tuple[Tensor, Tensor]]:
    """Pixels [batch, 3, height, width] and what digits they show, int64 [batch]."""
    settings = image_settings(model)
    while True:
        chosen = rng.choices(digits.TRAIN.tolist(), k=BATCH_SIZE)
        tiles = np.concatenate([cut(digits.varied_picture(i, rng), settings).tiles for i in chosen])
        yield normalize_pixels(torch.from_numpy(tiles)), torch.from_numpy(digits.LABELS[chosen])
