"""Networks that metrics look through: EfficientNet-Lite0, and AlexNet as ST-LPIPS trained it.

Own forward passes over published weights, which `scripts/convert_metric_networks.py` puts into
safetensors. Metrics made with them are called KID-EffNetLite0, class agreement and ST-LPIPS:
FID, LPIPS and CLIP score mean other networks.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

FILES = {"efficientnet_lite0": "efficientnet_lite0.safetensors", "stlpips": "stlpips.safetensors"}
_SIDE = 224  # pixels, of EfficientNet's input
_BN_EPSILON = 1e-3
_STARTS = {1: 2, 3: 2, 5: 2, 11: 2}  # blocks that halve the resolution
_BLOCKS = 16

Weights = dict[str, np.ndarray]


def load_network(folder: Path, name: str) -> Weights:
    """Return a network's weights by name, from a folder of converted ones.

    Raises:
      ValueError: the file is missing or can't be read.
    """
    path = Path(folder) / FILES[name]
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{path} can't be read ({error}); make it with scripts/convert_metric_networks.py"
        ) from None


@jax.jit
def efficientnet_lite0(
    weights: Weights,
    images: jax.Array,  # [b, h, w, 3], floats in 0..1
) -> tuple[jax.Array, jax.Array]:
    """Return features float32 [b, 1280] and ImageNet logits [b, 1000].

    Tan and Le, arXiv 1905.11946, in the Lite variant: no squeeze-and-excitation, ReLU6, and stem
    and head unscaled. Images are resized to 224 pixels, (255 x - 127) / 128.
    """
    shape = (images.shape[0], _SIDE, _SIDE, 3)
    x = jax.image.resize(images.astype(jnp.float32), shape, "bilinear")
    x = (255 * x - 127) / 128

    def layer(x, conv, norm, stride=1, groups=1, act=True):
        x = _conv(x, weights[f"{conv}.weight"], stride, "SAME", groups)
        gain = weights[f"{norm}.weight"] * jax.lax.rsqrt(
            weights[f"{norm}.running_var"] + _BN_EPSILON
        )
        x = (x - weights[f"{norm}.running_mean"]) * gain + weights[f"{norm}.bias"]
        return jnp.clip(x, 0, 6) if act else x

    x = layer(x, "_conv_stem", "_bn0", stride=2)
    for i in range(_BLOCKS):
        at, inputs = f"_blocks.{i}", x
        if i:
            x = layer(x, f"{at}._expand_conv", f"{at}._bn0")
        stride = _STARTS.get(i, 1)
        x = layer(x, f"{at}._depthwise_conv", f"{at}._bn1", stride, groups=x.shape[-1])
        x = layer(x, f"{at}._project_conv", f"{at}._bn2", act=False)
        x = x + inputs if x.shape == inputs.shape else x
    features = layer(x, "_conv_head", "_bn1").mean(axis=(1, 2))
    return features, features @ weights["_fc.weight"].T + weights["_fc.bias"]


@jax.jit
def stlpips(
    weights: Weights,
    images: jax.Array,  # [b, h, w, 3], floats in 0..1
    reference: jax.Array,  # the same shape
) -> jax.Array:
    """Return the shift-tolerant perceptual distance of each pair, float32 [b].

    Ghildyal and Liu, ECCV 2022 (arXiv 2207.13686), the AlexNet variant: LPIPS (arXiv 1801.03924)
    with stride one in the first convolution and blurred downsampling in the place of strides.
    """
    distance = jnp.float32(0)
    pairs = zip(_stages(weights, images), _stages(weights, reference), strict=True)
    for i, (a, b) in enumerate(pairs):
        difference = (_unit(a) - _unit(b)) ** 2
        distance += (difference @ weights[f"lin{i}.model.1.weight"][0, :, 0, 0]).mean(axis=(1, 2))
    return distance


def _stages(weights: Weights, images: jax.Array):
    """Yield the activations of the five stages."""
    x = 2 * images.astype(jnp.float32) - 1
    shift, scale = (weights[f"scaling_layer.{name}"][0, :, 0, 0] for name in ("shift", "scale"))
    x = (x - shift) / scale

    def conv(x, name, padding):
        y = _conv(x, weights[f"net.{name}.weight"], 1, [(padding, padding)] * 2)
        return y + weights[f"net.{name}.bias"]

    yield (x := jax.nn.relu(_blur(conv(x, "slice1.0", 2))))
    yield (x := jax.nn.relu(conv(_blur(_max_pool(x)), "slice2.5", 2)))
    yield (x := jax.nn.relu(conv(_blur(_max_pool(x)), "slice3.9", 1)))
    yield (x := jax.nn.relu(conv(x, "slice4.11", 1)))
    yield jax.nn.relu(conv(x, "slice5.13", 1))


def _conv(x, weight, stride, padding, groups=1) -> jax.Array:
    """Convolve [b, h, w, c] by [o, c / groups, h, w]."""
    return jax.lax.conv_general_dilated(
        x,
        weight,
        (stride, stride),
        padding,
        dimension_numbers=("NHWC", "OIHW", "NHWC"),
        feature_group_count=groups,
        precision=jax.lax.Precision.HIGHEST,
    )


def _max_pool(x: jax.Array) -> jax.Array:
    """Maximum over 3x3 windows, stride one, no padding."""
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 1, 1, 1), "VALID")


def _blur(x: jax.Array) -> jax.Array:
    """Halve the resolution after a 3x3 binomial filter; two pixels reflected at each edge."""
    x = jnp.pad(x, [(0, 0), (2, 2), (2, 2), (0, 0)], mode="reflect")
    filter_ = np.outer([1, 2, 1], [1, 2, 1]).astype(np.float32) / 16
    channels = x.shape[-1]
    return _conv(x, jnp.tile(filter_, (channels, 1, 1, 1)), 2, "VALID", channels)


def _unit(x: jax.Array) -> jax.Array:
    return x / (jnp.sqrt(jnp.sum(x**2, axis=-1, keepdims=True)) + 1e-10)


def features(
    weights: Weights, images: np.ndarray, batch: int = 64
) -> tuple[np.ndarray, np.ndarray]:
    """Return EfficientNet's features [n, 1280] and logits [n, 1000] of images in 0..1, or uint8."""
    parts = []
    for start in range(0, len(images), batch):
        part = images[start : start + batch]
        part = part / np.float32(255) if part.dtype == np.uint8 else part
        parts.append(jax.device_get(efficientnet_lite0(weights, part)))
    found, logits = (np.concatenate(column) for column in zip(*parts, strict=True))
    return found, logits


class ImageNetworks:
    """Both networks, loaded once, on numpy images batch by batch."""

    def __init__(self, folder: Path):
        self._effnet = load_network(folder, "efficientnet_lite0")
        self._stlpips = load_network(folder, "stlpips")
        tiny = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
        try:  # a file of other weights shows before any work
            jax.eval_shape(efficientnet_lite0, self._effnet, tiny)
            jax.eval_shape(stlpips, self._stlpips, tiny, tiny)
        except (KeyError, TypeError, ValueError) as error:
            told = str(error).splitlines()[0]
            raise ValueError(f"{folder} holds other networks than those needed: {told}") from None

    def features(self, images: np.ndarray, batch: int = 64) -> tuple[np.ndarray, np.ndarray]:
        """Return features [n, 1280] and logits [n, 1000] of images in 0..1, or uint8."""
        return features(self._effnet, images, batch)

    def distance(self, images: np.ndarray, reference: np.ndarray, batch: int = 8) -> np.ndarray:
        """Return ST-LPIPS of each pair of images [n, h, w, 3] in 0..1, float32 [n].

        A few at a time: early stages are large.
        """
        compare = functools.partial(stlpips, self._stlpips)
        starts = range(0, len(images), batch)
        parts = [compare(images[s : s + batch], reference[s : s + batch]) for s in starts]
        return np.concatenate(jax.device_get(parts))
