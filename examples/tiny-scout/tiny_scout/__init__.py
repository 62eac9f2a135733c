"""A small Llama 4 that reads handwritten digits: its data, its training, its checkpoint."""
