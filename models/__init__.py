"""Diffusion models, their encoders and samplers in plain Flax NNX."""
