"""Comparing recipes with the 16-bit model: images, metrics, results and pages."""
