"""Weights of `transformers` models at random."""

import torch


@torch.no_grad()
def randomized(model, seed):
    """Weights that make logits of order one: every part of the model shows in them."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.uniform_(0.5, 1.5, generator=generator)
        else:
            by_rows = parameter.dim() == 3 and "llama4" in model.config.model_type
            width = parameter.shape[-2] if by_rows else parameter.shape[-1]
            std = 1.0 if "embed" in name else 1.5 / width**0.5
            parameter.normal_(std=std, generator=generator)
    return model.eval()
