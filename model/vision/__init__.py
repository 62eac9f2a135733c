"""Images: from pixels of tiles to embeddings of image tokens."""

from model.vision.embedding import VisionEmbeddings

__all__ = ["VisionEmbeddings"]
