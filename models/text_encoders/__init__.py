"""Text encoders: T5 and CLIP."""

from models.text_encoders.clip import CLIP_TEXT, CLIPTextConfig, CLIPTextEncoder
from models.text_encoders.t5 import T5_ENCODER, T5Config, T5Encoder

__all__ = [
    "CLIP_TEXT",
    "T5_ENCODER",
    "CLIPTextConfig",
    "CLIPTextEncoder",
    "T5Config",
    "T5Encoder",
]
