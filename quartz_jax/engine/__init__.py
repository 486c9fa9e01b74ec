"""How quantized layers run."""
