"""From a 16-bit model to a quantized one, in memory or as a checkpoint."""
