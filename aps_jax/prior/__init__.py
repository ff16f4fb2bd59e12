"""Masked transformers over token grids: network, prompts, windows over larger fields."""
