"""Checkpoints that Keras wrote: real names for their tensors, `.keras` archives, sharded weights."""
