"""Image encoders: SigLIP."""

from models.image_encoders.siglip import (
    SIGLIP_VISION,
    SiglipVisionConfig,
    SiglipVisionEncoder,
    to_pixels,
)

__all__ = ["SIGLIP_VISION", "SiglipVisionConfig", "SiglipVisionEncoder", "to_pixels"]
