"""Time a FLUX.1-dev step of diffusers: eager, compiled, and compiled with float8 linears."""

import argparse
import time
from typing import Any

import common
import torch
from diffusers import FluxTransformer2DModel

WAYS = ("eager", "compile", "fp8")
_FLOAT8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(_FLOAT8).max


class RowwiseFloat8(torch.nn.Module):
    """A linear with a scale for each output channel and, found in the call, for each token."""

    def __init__(self, linear: torch.nn.Linear):
        super().__init__()
        self.out_features, self.bias = linear.out_features, linear.bias
        weight, scale = quantize(linear.weight.detach())
        self.register_buffer("weight", weight)  # [n, k]
        self.register_buffer("scale", scale.T.contiguous())  # [1, n]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [..., n] for x [..., k]."""
        rows, scale = quantize(x.reshape(-1, x.shape[-1]))
        y = torch._scaled_mm(
            rows,
            self.weight.T,
            scale_a=scale,
            scale_b=self.scale,
            bias=self.bias,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
        return y.reshape(*x.shape[:-1], self.out_features)


def quantize(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows [m, k] in float8, and their scales, float32 [m, 1]."""
    scale = x.abs().amax(dim=1, keepdim=True).float().clamp(min=1e-12) / _LARGEST
    return (x.float() / scale).to(_FLOAT8), scale


def make_model(seed: int) -> torch.nn.Module:
    """Return the transformer of FLUX.1-dev with random weights on the GPU, bfloat16."""
    torch.manual_seed(seed)
    with torch.device("meta"):
        model = FluxTransformer2DModel(guidance_embeds=True)
    model = model.to(torch.bfloat16).to_empty(device="cuda").eval()
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            torch.nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
        elif "norm" in name and name.endswith("weight"):
            torch.nn.init.ones_(weight)
        else:
            torch.nn.init.normal_(weight, std=0.02)
    return model


def in_float8(model: torch.nn.Module) -> None:
    """Put float8 linears in the place of the blocks' own, but for modulations, of one row each."""
    for blocks in (model.transformer_blocks, model.single_transformer_blocks):
        for parent in list(blocks.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, torch.nn.Linear) and "Norm" not in type(parent).__name__:
                    setattr(parent, name, RowwiseFloat8(child))


def make_inputs(side: int, text_tokens: int) -> dict[str, Any]:
    """Return what a step of one square image takes; side in pixels."""
    tokens = (side // 16) ** 2
    options: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    ids = torch.zeros(tokens, 3, **options)
    ids[:, 1] = torch.arange(tokens) // (side // 16)
    ids[:, 2] = torch.arange(tokens) % (side // 16)
    return {
        "hidden_states": torch.randn(1, tokens, 64, **options),
        "encoder_hidden_states": torch.randn(1, text_tokens, 4096, **options),
        "pooled_projections": torch.randn(1, 768, **options),
        "timestep": torch.tensor([0.5], **options),
        "guidance": torch.tensor([3.5], device="cuda"),
        "img_ids": ids,
        "txt_ids": torch.zeros(text_tokens, 3, **options),
        "return_dict": False,
    }


@torch.inference_mode()
def measure(way: str, args: argparse.Namespace) -> dict[str, float]:
    """Return first call, step and memory of one way."""
    torch.compiler.reset()
    torch.cuda.reset_peak_memory_stats()
    model = make_model(args.seed)
    if way != "eager":
        model.fuse_qkv_projections()
    if way == "fp8":
        in_float8(model)
        torch.cuda.empty_cache()
    if way != "eager":
        model.compile_repeated_blocks(fullgraph=True)
    inputs = make_inputs(args.side, args.text_tokens)
    start = time.perf_counter()
    (made,) = model(**inputs)
    torch.cuda.synchronize()
    first = time.perf_counter() - start
    if not bool(torch.isfinite(made).all()):
        raise ValueError(f"{way}: the step's result isn't finite")
    step = common.queued_ms(lambda: model(**inputs), args.steps)
    peak = torch.cuda.max_memory_allocated()
    return {"first_call_s": first, "queued_ms": step, "peak_bytes": peak}


def main() -> None:
    """Measure the ways one after another."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--side", type=int, default=1024, help="of the image, in pixels")
    parser.add_argument("--text-tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=10, help="that are enqueued together")
    parser.add_argument("--seed", type=int, default=0, help="of weights and inputs")
    parser.add_argument("--out", type=common.output, required=True, help="JSON file")
    args = parser.parse_args()
    results = {}
    for way in args.ways:
        results[way] = measure(way, args)
        torch.cuda.empty_cache()
        print(way, {name: round(value, 2) for name, value in results[way].items()}, flush=True)
    common.write(args.out, ["diffusers"], results)


if __name__ == "__main__":
    main()
