"""Text encoders: T5, CLIP and causal decoders."""

from models.text_encoders.clip import (
    CLIP_TEXT,
    CLIP_TEXT_PROJECTED,
    CLIPTextConfig,
    CLIPTextEncoder,
    ProjectedCLIPTextConfig,
)
from models.text_encoders.decoder import DECODER, Decoder, DecoderConfig, decoder_component
from models.text_encoders.t5 import T5_ENCODER, T5Config, T5Encoder

__all__ = [
    "CLIP_TEXT",
    "CLIP_TEXT_PROJECTED",
    "DECODER",
    "T5_ENCODER",
    "CLIPTextConfig",
    "CLIPTextEncoder",
    "Decoder",
    "DecoderConfig",
    "ProjectedCLIPTextConfig",
    "T5Config",
    "T5Encoder",
    "decoder_component",
]
