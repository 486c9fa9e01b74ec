"""Start pictures of every depth, with transparency and without, and what is refused."""

import os

import numpy as np
import pytest
from PIL import Image

from quartz_jax.io.images import read_image

GREYS = np.linspace(0, 255, 64).round().astype(np.uint8)[None].repeat(64, 0)
PHOTO = np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)


def read(path):
    image = read_image(path)
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize("name", ["x.png", "x.tif", "x.pgm"])
def test_greys_of_16_bits_are_those_of_8(tmp_path, name):
    Image.fromarray(GREYS.astype(np.uint16) * 257).save(tmp_path / name)
    np.testing.assert_array_equal(read(tmp_path / name), np.stack([GREYS] * 3, axis=-1))


def test_greys_of_16_bits_are_rounded_to_the_nearest(tmp_path):
    deep = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(deep).save(tmp_path / "x.png")
    wanted = np.round(deep / 257).astype(np.uint8)
    np.testing.assert_array_equal(read(tmp_path / "x.png")[..., 0], wanted)


def test_a_deep_picture_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x112] = 3  # upside down
    Image.fromarray(GREYS.astype(np.uint16) * 257).save(tmp_path / "x.png", exif=exif)
    np.testing.assert_array_equal(read(tmp_path / "x.png")[..., 0], GREYS[::-1, ::-1])


@pytest.mark.parametrize("values", [np.linspace(0, 1, 64), np.arange(64) * 1000])
@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_numbers_of_an_unknown_range_are_refused(tmp_path, values, dtype):
    Image.fromarray(values.astype(dtype)[None].repeat(8, 0)).save(tmp_path / "x.tif")
    with pytest.raises(ValueError, match="range isn't known; save it with 8 or 16 bits"):
        read_image(tmp_path / "x.tif")


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_what_is_hidden_under_transparent_pixels_is_white(tmp_path, mode):
    for hidden in (0, 200):
        colour = (hidden, hidden, hidden, 0) if mode == "RGBA" else (hidden, 0)
        image = Image.new(mode, (8, 8), colour)
        image.paste((60, 60, 60, 255) if mode == "RGBA" else (60, 255), (2, 2, 6, 6))
        image.save(tmp_path / "x.png")
        wanted = np.full((8, 8, 3), 255)
        wanted[2:6, 2:6] = 60
        np.testing.assert_array_equal(read(tmp_path / "x.png"), wanted)


@pytest.mark.parametrize(
    ("pixels", "mode", "transparent"),
    [
        (np.uint8([[0, 1], [2, 0]]), "P", 0),
        (np.uint8([[9, 1], [2, 9]]), "L", 9),
        (np.uint16([[999, 257], [514, 999]]), "I;16", 999),
    ],
)
def test_a_transparent_colour_or_grey_is_white(tmp_path, pixels, mode, transparent):
    image = Image.fromarray(pixels)
    if mode == "P":
        image = Image.fromarray(pixels, "P")
        image.putpalette([50, 50, 50, 1, 1, 1, 2, 2, 2])
    image.save(tmp_path / "x.png", transparency=transparent)
    np.testing.assert_array_equal(read(tmp_path / "x.png")[..., 0], [[255, 1], [2, 255]])


def test_a_picture_without_transparent_pixels_keeps_every_value(tmp_path):
    plain = Image.fromarray(PHOTO)
    plain.save(tmp_path / "plain.png")
    plain.putalpha(255)
    plain.save(tmp_path / "alpha.png")
    for name in ("plain.png", "alpha.png"):
        np.testing.assert_array_equal(read(tmp_path / name), PHOTO)


@pytest.mark.parametrize("content", [b"", b"GIF89a", b"\x89PNG\r\n\x1a\n" + bytes(20)])
def test_what_is_no_picture_is_named(tmp_path, content):
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.png can't be read"):
        read_image(tmp_path / "x.png")


def test_what_is_no_regular_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.png")
    with pytest.raises(ValueError, match="no regular file"):
        read_image(tmp_path / "x.png")
