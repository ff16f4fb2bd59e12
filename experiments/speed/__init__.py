"""What the sampler costs: seconds, memory and FLOP, of itself, its parts and its rivals."""
