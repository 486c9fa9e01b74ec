"""The matmuls of real models, by name: y[m, n] = x[m, k] w[n, k]^T."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """Extents of one matmul."""

    m: int  # tokens
    n: int  # output channels
    k: int  # input channels, the contraction


# FLUX.1 at 1024 x 1024: 4096 image and 512 text tokens. DiT-XL/2 and PixArt-alpha at 512 x 512.
SHAPES = {
    "flux-qkv": Shape(m=4608, n=9216, k=3072),
    "flux-proj": Shape(m=4608, n=3072, k=3072),
    "flux-mlp-up": Shape(m=4608, n=12288, k=3072),
    "flux-mlp-down": Shape(m=4608, n=3072, k=12288),
    "flux-single-in": Shape(m=4608, n=21504, k=3072),
    "flux-single-out": Shape(m=4608, n=3072, k=15360),
    "flux-adaln": Shape(m=1, n=18432, k=3072),
    # The same as the models run it, a 16-bit row as two of int8: double- and single-stream blocks'.
    "modulation-double": Shape(m=2, n=18432, k=3072),
    "modulation-single": Shape(m=2, n=9216, k=3072),
    "dit-xl-qkv": Shape(m=2048, n=3456, k=1152),
    "dit-xl-mlp-up": Shape(m=2048, n=4608, k=1152),
    "dit-xl-mlp-down": Shape(m=2048, n=1152, k=4608),
    "pixart-qkv": Shape(m=2048, n=3456, k=1152),
    "pixart-mlp-up": Shape(m=2048, n=4608, k=1152),
    "pixart-mlp-down": Shape(m=2048, n=1152, k=4608),
}
