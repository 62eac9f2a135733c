"""What goes wrong with a checkpoint."""


class CheckpointError(Exception):
    """A checkpoint cannot be found, read, or made to fit. The message names the culprit and, if any, the remedy."""
