"""Metric networks with random weights against the same layers in torch."""

import jax
import numpy as np
import pytest

from quartz_jax.evaluation import metrics_jax as networks
from quartz_jax.evaluation.metrics import kernel_distance

torch = pytest.importorskip("torch")
F = torch.nn.functional


class Weights(dict):
    """Makes a random tensor when a name is first asked for; `like` says its shape."""

    def __init__(self, seed):
        super().__init__()
        self.rng = np.random.default_rng(seed)

    def add(self, name, *shape, positive=False):
        fan_in = max(1, int(np.prod(shape[1:])))
        x = self.rng.normal(size=shape) / np.sqrt(fan_in)
        self[name] = (np.abs(x) + 0.5 if positive else x).astype(np.float32)


def effnet_weights():
    w = Weights(0)

    def norm(name, c):
        w.add(f"{name}.weight", c, positive=True)
        w.add(f"{name}.bias", c)
        w.add(f"{name}.running_mean", c)
        w.add(f"{name}.running_var", c, positive=True)

    w.add("_conv_stem.weight", 32, 3, 3, 3)
    norm("_bn0", 32)
    stages = [(1, 3, 1, 16), (2, 3, 6, 24), (2, 5, 6, 40), (3, 3, 6, 80)]
    stages += [(3, 5, 6, 112), (4, 5, 6, 192), (1, 3, 6, 320)]
    i, c = 0, 32
    for repeats, kernel, expand, out in stages:
        for _ in range(repeats):
            at, wide = f"_blocks.{i}", c * expand
            if expand > 1:
                w.add(f"{at}._expand_conv.weight", wide, c, 1, 1)
                norm(f"{at}._bn0", wide)
            w.add(f"{at}._depthwise_conv.weight", wide, 1, kernel, kernel)
            norm(f"{at}._bn1", wide)
            w.add(f"{at}._project_conv.weight", out, wide, 1, 1)
            norm(f"{at}._bn2", out)
            i, c = i + 1, out
    w.add("_conv_head.weight", 1280, 320, 1, 1)
    norm("_bn1", 1280)
    w.add("_fc.weight", 1000, 1280)
    w.add("_fc.bias", 1000)
    return dict(w)


def effnet_torch(w, images):
    w = {k: torch.tensor(v) for k, v in w.items()}

    def unit(x, conv, norm, stride=1, groups=1, act=True):
        kernel = w[f"{conv}.weight"]
        size, side = kernel.shape[-1], x.shape[-1]
        total = max((-(-side // stride) - 1) * stride + size - side, 0)  # TensorFlow's "same"
        x = F.pad(x, [total // 2, total - total // 2] * 2)
        x = F.conv2d(x, kernel, stride=stride, groups=groups)
        statistics = (w[f"{norm}.running_mean"], w[f"{norm}.running_var"])
        x = F.batch_norm(x, *statistics, w[f"{norm}.weight"], w[f"{norm}.bias"], eps=1e-3)
        return F.relu6(x) if act else x

    x = (255 * torch.tensor(images).permute(0, 3, 1, 2) - 127) / 128
    x = unit(x, "_conv_stem", "_bn0", 2)
    strides = [1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1]
    for i, stride in enumerate(strides):
        at, before = f"_blocks.{i}", x
        if f"{at}._expand_conv.weight" in w:
            x = unit(x, f"{at}._expand_conv", f"{at}._bn0")
        x = unit(x, f"{at}._depthwise_conv", f"{at}._bn1", stride, x.shape[1])
        x = unit(x, f"{at}._project_conv", f"{at}._bn2", act=False)
        if stride == 1 and x.shape == before.shape:
            x = x + before
    features = unit(x, "_conv_head", "_bn1").mean((2, 3))
    return features, F.linear(features, w["_fc.weight"], w["_fc.bias"])


def test_efficientnet_lite0_is_the_same_in_torch():
    weights = effnet_weights()
    images = np.random.default_rng(1).random((2, 224, 224, 3), np.float32)
    for got, expected in zip(
        networks.efficientnet_lite0(weights, images), effnet_torch(weights, images), strict=True
    ):
        np.testing.assert_allclose(
            got, expected, rtol=2e-3, atol=2e-4 * float(expected.abs().max())
        )


LAYERS = [("slice1.0", 64, 3, 11), ("slice2.5", 192, 64, 5), ("slice3.9", 384, 192, 3)]
LAYERS += [("slice4.11", 256, 384, 3), ("slice5.13", 256, 256, 3)]


def stlpips_weights():
    w = Weights(2)
    for i, (name, out, inputs, kernel) in enumerate(LAYERS):
        w.add(f"net.{name}.weight", out, inputs, kernel, kernel)
        w.add(f"net.{name}.bias", out)
        w.add(f"lin{i}.model.1.weight", 1, out, 1, 1, positive=True)
    w["scaling_layer.shift"] = np.array([-0.03, -0.088, -0.188], np.float32).reshape(1, 3, 1, 1)
    w["scaling_layer.scale"] = np.array([0.458, 0.448, 0.45], np.float32).reshape(1, 3, 1, 1)
    return dict(w)


def stlpips_torch(w, *images):
    w = {k: torch.tensor(v) for k, v in w.items()}

    def blur(x):
        line = torch.tensor([0.25, 0.5, 0.25])
        kernel = torch.outer(line, line).expand(x.shape[1], 1, 3, 3)
        return F.conv2d(F.pad(x, [2] * 4, "reflect"), kernel, stride=2, groups=x.shape[1])

    def stages(x):
        x = (2 * torch.tensor(x).permute(0, 3, 1, 2) - 1 - w["scaling_layer.shift"]) / w[
            "scaling_layer.scale"
        ]
        for i, (name, *_, kernel) in enumerate(LAYERS):
            if i in (1, 2):
                x = blur(F.max_pool2d(x, 3, 1))
            padding = 2 if kernel > 3 else 1
            x = F.conv2d(x, w[f"net.{name}.weight"], w[f"net.{name}.bias"], padding=padding)
            x = F.relu(blur(x) if i == 0 else x)
            yield x / (x.norm(dim=1, keepdim=True) + 1e-10)

    return sum(
        F.conv2d((a - b) ** 2, w[f"lin{i}.model.1.weight"]).mean((1, 2, 3))
        for i, (a, b) in enumerate(zip(*map(stages, images), strict=True))
    )


def test_stlpips_is_the_same_in_torch():
    weights = stlpips_weights()
    a, b = np.random.default_rng(3).random((2, 2, 48, 48, 3), np.float32)
    expected = stlpips_torch(weights, a, b)
    np.testing.assert_allclose(networks.stlpips(weights, a, b), expected, rtol=1e-3)
    assert networks.stlpips(weights, a, a).max() < 1e-12


def test_a_missing_network_says_how_to_make_it(tmp_path):
    with pytest.raises(ValueError, match="convert_metric_networks"):
        networks.load_network(tmp_path, "stlpips")


def features_of(seed, n, shift=0.0):
    return np.asarray(jax.random.normal(jax.random.key(seed), (n, 32))) + shift


def kid_directly(x, y):
    """The unbiased estimate, pair by pair."""
    kernel = lambda a, b: (a @ b / len(a) + 1) ** 3  # noqa: E731
    same = lambda x: np.mean(  # noqa: E731
        [kernel(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j]
    )
    return same(x) + same(y) - 2 * np.mean([kernel(a, b) for a in x for b in y])


def test_kernel_distance_is_the_unbiased_estimate():
    x, y = features_of(0, 20), features_of(1, 25, 0.3)
    got = kernel_distance(x, y).mean
    assert got == pytest.approx(1000 * kid_directly(x.astype(float), y.astype(float)), rel=1e-6)


def test_kernel_distance_s_interval_holds_zero_for_one_distribution_and_not_for_two():
    same = kernel_distance(features_of(0, 200), features_of(1, 200))
    other = kernel_distance(features_of(0, 200), features_of(1, 200, 0.5))
    assert same.low < 0 < same.high
    assert other.low > same.high
