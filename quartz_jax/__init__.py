"""QuaRTZ 4-bit quantization (arXiv 2509.26436) for diffusion transformers in JAX."""
