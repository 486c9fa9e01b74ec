"""The order in which the Hopper kernel reads 4-bit weights, and what it decodes them to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import codec
from pallas_kernels.matmul import mosaic_gpu
from pallas_kernels.operands import PackedRows, int8_values

KINDS = {
    "power": ({"step": "power"}, 5),
    "integer": ({"step": "integer"}, 16),
    "stretched": ({"step": "integer", "levels": "stretched"}, 14),
}


@pytest.mark.parametrize(("kind", "steps"), KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("group_size", [8, 16, 32, 64])
def test_every_tile_decodes_to_its_rows_and_columns(group_size, kind, steps):
    rng = np.random.default_rng(0)
    n, k = 200, 320
    codes = rng.integers(-7, 8, (n, k), np.int8)
    shifts = rng.integers(0, steps, (n, k // group_size), np.uint8)
    packed = codec.pack(jnp.asarray(codes)), codec.pack(jnp.asarray(shifts))
    w = PackedRows(
        codes=packed[0], shifts=packed[1], scale=jnp.ones((n, 1)), group_size=group_size, **kind
    )
    words, stored = mosaic_gpu.prepare(w).tiles
    wanted = np.zeros((256, 384), np.int8)  # padded to whole tiles
    wanted[:n, :k] = int8_values(w)

    @jax.jit
    def decode(words, stored):
        return mosaic_gpu.decode_tile_jnp(words, stored, w.levels)

    for row in range(0, 256, mosaic_gpu.ROWS):
        part, half = divmod(row, mosaic_gpu.TILE_N)
        for column in range(0, 384, mosaic_gpu.TILE_K):
            at = part, column // mosaic_gpu.TILE_K
            found = decode(
                words[at][half // 8 : half // 8 + 8],
                stored[at][:, half : half + mosaic_gpu.ROWS],
            )
            span = slice(row, row + mosaic_gpu.ROWS), slice(column, column + mosaic_gpu.TILE_K)
            np.testing.assert_array_equal(found, wanted[span])
