"""One tensor-parallel rank: its slice of the model, its KV blocks, its sampler."""
