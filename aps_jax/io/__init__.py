"""Edges: files, checkpoints, tensors on disk, names that users type."""
