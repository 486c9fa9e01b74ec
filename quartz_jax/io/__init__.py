"""Files, images and provenance: nothing here knows of quantization."""
