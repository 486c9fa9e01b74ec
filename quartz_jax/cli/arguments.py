"""What the commands share: arguments, and one clear line with exit code 2 for bad input."""

import argparse
import math
import os
import re
import secrets
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from quartz_jax.recipes import MAIN, Recipe, get_recipe

COMPONENT_RECIPES = (
    "built-in recipe or .json file for the transformer; or several by component, such as "
    "transformer=w4a8x,text_encoder_2=w4a16"
)


class ArgumentParser(argparse.ArgumentParser):
    """An argument parser whose errors are ValueErrors, for `run` to print on one line."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage and exiting."""
        raise ValueError(f"{message} (see --help)")


def run(
    main: Callable[[Sequence[str] | None], int | None], argv: Sequence[str] | None = None
) -> int:
    """Call a command's main and return its exit code, 0 for None; 2 after one line on stderr.

    ValueError and OSError are how the libraries report bad input, and what the machine lacks ends
    in a line too; anything else is a defect and keeps its traceback. 130 after an interruption, and
    141 where nobody reads the output any more, as shells have it.
    """
    try:
        code = main(argv) or 0
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at the end
        return 141
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        told = str(error)
    except MemoryError as error:
        told = f"not enough memory: {error}"
    except RuntimeError as error:
        if not (lacking := _lacking(str(error))):
            raise
        told = lacking
    print("error:", " ".join(told.split()), file=sys.stderr)
    return 2


def _lacking(told: str) -> str | None:
    """Return what the machine lacks, from JAX's words; None for other errors."""
    if "Unable to initialize backend" in told or "Unknown backend" in told:
        return f"{told}; JAX_PLATFORMS names what JAX runs on"
    if "RESOURCE_EXHAUSTED" in told or "Out of memory" in told:
        return f"the device has not enough memory: {told}; make fewer or smaller images at once"
    return None


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that shape an image; all default to the model's own settings."""
    parser.add_argument("--steps", type=positive, help="denoising steps; default: the model's")
    parser.add_argument("--guidance", type=finite, help="distilled guidance; default: the model's")
    parser.add_argument("--true-cfg", type=finite, help="classifier-free; default: the model's")
    parser.add_argument("--size", metavar="WxH", help="multiples of 16; default: the model's")


def add_schedule(parser: argparse.ArgumentParser) -> None:
    """Add whose noise levels are taken, which single files don't say."""
    parser.add_argument(
        "--schedule",
        "--scheduler",
        metavar="NAME",
        help="noise levels: the family's, such as dev or schnell, or those of the folder that "
        "--text-encoders names (folder); default: the model's own",
    )


def add_seed(parser: argparse.ArgumentParser) -> None:
    """Add the seed of random inputs that a figure mustn't depend on: a fresh one, or a given."""
    parser.add_argument(
        "--seed", type=seed, default=secrets.randbelow(2**31), help="of the inputs; default: fresh"
    )


def positive(text: str) -> int:
    """Return a whole number of at least 1, for argparse."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def finite(text: str) -> float:
    """Return a number that is neither infinite nor NaN, for argparse."""
    if not math.isfinite(float(text)):
        raise argparse.ArgumentTypeError(f"{text} is no finite number")
    return float(text)


def amount(text: str) -> float:
    """Return a finite number above 0, for argparse."""
    if not 0 < float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no finite number above 0")
    return float(text)


def share(text: str) -> float:
    """Return a share from 0 to below 1, for argparse."""
    if not 0 <= float(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is outside 0 to below 1")
    return float(text)


def check_order(stages: Sequence[str], known: Sequence[str]) -> None:
    """Raise ValueError unless stages are given once each, and in the order of the known ones."""
    order = [stage for stage in known if stage in stages]
    if list(stages) != order:
        raise ValueError(f"stages are given as {' '.join(stages)}; run {' '.join(order)}")


def seed(text: str) -> int:
    """Return what gives a noise of its own, for argparse: JAX takes seeds modulo 2**32."""
    if not 0 <= int(text) < 2**32:
        raise argparse.ArgumentTypeError(f"{text} is outside 0 to {2**32 - 1}")
    return int(text)


def parse_size(text: str | None) -> tuple[int, int] | tuple[None, None]:
    """Return (width, height) in pixels from text such as "1024x768"; (None, None) from None.

    Raises ValueError for other text and for sides that are no positive multiple of 16.
    """
    if text is None:
        return None, None
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if not match:
        raise ValueError(f"size is {text!r}; write WIDTHxHEIGHT, such as 1024x768")
    sides = {"width": int(match[1]), "height": int(match[2])}
    for side, pixels in sides.items():
        if pixels == 0 or pixels % 16:
            raise ValueError(f"{side} is {pixels}; it must be a positive multiple of 16")
    return sides["width"], sides["height"]


def component_recipes(text: str) -> dict[str, Recipe]:
    """Return recipes by component from text such as "w4a8x" or "transformer=w4a8x,vae=w8a8".

    Raises:
      ValueError: an unknown recipe, a component without one, or one that is named twice.
    """
    if not re.match(r"\w+=", text):
        return {MAIN: get_recipe(text)}
    pairs = [part.strip().partition("=") for part in text.split(",")]
    for name, equals, recipe in pairs:
        if not (name and equals and recipe):
            raise ValueError(f"--recipe {text!r}: write COMPONENT=RECIPE,COMPONENT=RECIPE")
    names = [name for name, _, _ in pairs]
    if len(set(names)) < len(names):
        raise ValueError(f"--recipe {text!r} names a component twice")
    return {name: get_recipe(recipe) for name, _, recipe in pairs}


def lora_scales(files: Sequence[Path], scales: Sequence[float]) -> list[tuple[Path, float]]:
    """Return each adapter file with its scale, 1 where none was given.

    Raises ValueError for more scales than files.
    """
    if len(scales) > len(files):
        raise ValueError(
            f"--lora-scale was given {len(scales)} times, --lora {len(files)}; give one for each "
            "file, in order"
        )
    given = [*scales, *[1.0] * (len(files) - len(scales))]
    return list(zip(files, given, strict=True))


def check_strength(strength: float | None, image: Path | None) -> None:
    """Raise ValueError if a strength is outside (0, 1] or has no image to work on."""
    if strength is None:
        return
    if image is None:
        raise ValueError("--strength needs an image to start from; add --init-image")
    if not 0 < strength <= 1:
        raise ValueError(f"--strength is {strength}; it must be above 0 and at most 1")
