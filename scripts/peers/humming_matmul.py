"""Time Humming's int4 x int8 products, and bf16, at the six shapes of a FLUX.1-dev step."""

import argparse
import json

import common
import torch
from humming.forward import may_quant_input
from humming.layer import HummingLayer
from humming.testing.data import random_fill_tensor
from humming.tune import get_heuristics_config

SHAPES = {  # name to n and k
    "qkv": (9216, 3072),
    "proj": (3072, 3072),
    "mlp up": (12288, 3072),
    "mlp down": (3072, 12288),
    "single in": (21504, 3072),
    "single out": (3072, 15360),
}


def humming_ms(m: int, n: int, k: int, group_size: int, calls: int) -> float:
    """Return milliseconds of a product alone, its input quantized before."""
    layer = HummingLayer(
        shape_n=n,
        shape_k=k,
        weight_config={"dtype": "uint4", "group_size": group_size, "scale_dtype": "bfloat16"},
        input_config={"dtype": "int8", "group_size": 0},
        torch_dtype=torch.bfloat16,
    ).to("cuda:0")
    for tensor in layer.parameters():
        random_fill_tensor(tensor)
    layer.transform()
    x = torch.randn((m, k), dtype=torch.bfloat16, device="cuda:0")
    rows, scale = may_quant_input(layer.humming_config, x)
    tuning = get_heuristics_config(layer.humming_config, gemm_type="dense")
    options = {"compute_config": json.dumps({"gemm_type": "dense"}), "tuning_config": tuning}

    def run() -> torch.Tensor:
        return layer(inputs=rows, input_scale=scale, **options)

    run()
    return common.queued_ms(run, calls)


def bf16_ms(m: int, n: int, k: int, calls: int) -> float:
    """Return milliseconds of the same product by cuBLAS."""
    x = torch.randn((m, k), dtype=torch.bfloat16, device="cuda:0")
    w = torch.randn((n, k), dtype=torch.bfloat16, device="cuda:0")
    torch.nn.functional.linear(x, w)
    return common.queued_ms(lambda: torch.nn.functional.linear(x, w), calls)


def main() -> None:
    """Measure all shapes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=4608)
    parser.add_argument("--calls", type=int, default=50, help="that are enqueued together")
    parser.add_argument("--out", type=common.output, required=True, help="JSON file")
    args = parser.parse_args()
    results = {}
    for name, (n, k) in SHAPES.items():
        m, calls = args.tokens, args.calls
        times = {"bf16": bf16_ms(m, n, k, calls)}
        times |= {"int4 by channel": humming_ms(m, n, k, 0, calls)}
        times |= {"int4 in groups of 128": humming_ms(m, n, k, 128, calls)}
        rates = {way: 2e-9 * m * n * k / ms for way, ms in times.items()}  # 10**12 a second
        results[name] = {"m": m, "n": n, "k": k, "ms": times, "tops": rates}
        print(name, {way: f"{1e3 * ms:.0f} us, {rates[way]:.0f}" for way, ms in times.items()})
    common.write(args.out, ["humming-kernels"], results)


if __name__ == "__main__":
    main()
