"""Text encoders: T5 and CLIP."""

from models.text_encoders.clip import (
    CLIPTextConfig,
    CLIPTextEncoder,
    export_clip_text_encoder,
    load_clip_text_encoder,
)
from models.text_encoders.t5 import T5Config, T5Encoder, export_t5_encoder, load_t5_encoder

__all__ = [
    "CLIPTextConfig",
    "CLIPTextEncoder",
    "T5Config",
    "T5Encoder",
    "export_clip_text_encoder",
    "export_t5_encoder",
    "load_clip_text_encoder",
    "load_t5_encoder",
]
