"""Checks of arguments that several codecs take."""

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from diffusers_compress.format.container import Header


def check_rates(rates: dict[str, Any], required: bool = True) -> None:
    """ValueError unless exactly one rate is given (at most one if none is required), in its range; `target_metric` is a pair."""
    given = {name: rate for name, rate in rates.items() if rate is not None}
    if len(given) > 1 or required and not given:
        count, names = "exactly" if required else "at most", list(rates)
        raise ValueError(f"give {count} one of {', '.join(names[:-1])} and {names[-1]}; given: {', '.join(given) or 'none'}")
    for name, rate in given.items():
        rate = rate[1] if isinstance(rate, tuple) else rate
        if not rate > 0:
            raise ValueError(f"{name} must be above 0, not {rate}")
        if name == "fidelity" and rate > 1:
            raise ValueError(f"fidelity must be in (0, 1], not {rate}")


def permitted_bytes(header: Header, target_bpp: float | None, max_bytes: float | None) -> float:
    """Of a picture's file; infinite without a rate."""
    if max_bytes is None and target_bpp is not None:
        return header.width * header.height * target_bpp / 8
    return math.inf if max_bytes is None else max_bytes


def prompts_of(prompt: str | list[str], count: int, max_bytes: int) -> list[str]:
    """A prompt for each picture; ValueError if there are not as many, or one is too long."""
    prompts = [prompt] * count if isinstance(prompt, str) else list(prompt)
    if len(prompts) != count:
        raise ValueError(f"{len(prompts)} prompts were given for {count} pictures")
    longest = max((len(text.encode()) for text in prompts), default=0)
    if longest > max_bytes:
        raise ValueError(f"a prompt may have at most {max_bytes} bytes, not {longest}")
    return prompts


def check_choice(name: str, value: str, permitted: Iterable[str]) -> None:
    """ValueError unless the value is one of the permitted ones."""
    if value not in permitted:
        raise ValueError(f"{name} must be one of {', '.join(permitted)}, not {value!r}")


def check_positive(name: str, value: int) -> None:
    """ValueError unless the value is at least 1."""
    if value < 1:
        raise ValueError(f"{name} must be at least 1, not {value}")


def check_walk(num_inference_steps: int | None, realism: float = 1.0) -> None:
    """ValueError for an argument of `decompress` out of its range."""
    if num_inference_steps is not None:
        check_positive("num_inference_steps", num_inference_steps)
    if not 0 <= realism <= 1:
        raise ValueError(f"realism must be from 0 to 1, not {realism}")


def check_output_type(output_type: str) -> None:
    """ValueError for an argument of `decompress` out of its range."""
    check_choice("output_type", output_type, ("pil", "np", "pt"))


def samples(contents: list, count: int, draws: bool) -> list:
    """What was read of files, each `count` times: with the seeds s, s + 1, ... if its parameters hold a seed.

    ValueError for another number than 1 if they hold none, and the decoder does not draw at random.
    """
    check_positive("num_images_per_prompt", count)
    seeded = all(hasattr(parameters, "seed") for _, parameters, *_ in contents)
    if count > 1 and not (seeded or draws):
        raise ValueError("num_images_per_prompt must be 1: decoded so, nothing is drawn at random, and a file is one picture")
    if count == 1 or not seeded:
        return [content for content in contents for _ in range(count)]
    return [
        (header, replace(parameters, seed=(parameters.seed + k) % 2**32), *rest)
        for header, parameters, *rest in contents
        for k in range(count)
    ]


def generators_of(generator: Any, count: int) -> list:
    """A random generator, or None, for each file. ValueError if a list has not as many."""
    if not isinstance(generator, list):
        return [generator] * count
    if count and len(generator) != count:
        raise ValueError(f"{len(generator)} generators were given for {count} files")
    return generator
