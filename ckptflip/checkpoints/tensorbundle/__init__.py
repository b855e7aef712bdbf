"""TensorFlow's TensorBundle: the files of `tf.train.Checkpoint` and of a SavedModel's variables."""

from ckptflip.checkpoints.tensorbundle.bundle import index_of, open_checkpoint, siblings

__all__ = ["index_of", "open_checkpoint", "siblings"]
