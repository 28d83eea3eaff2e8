"""The most that a file may ask for."""

from dataclasses import dataclass

from diffusers_compress.errors import LimitExceeded


@dataclass(frozen=True)
class Limits:
    """The most that a file may ask for: pixels of the picture, bytes of codec parameters, of them bytes of the prompt, and coded steps
    (network calls). Pass larger ones for more."""

    pixels: int = 100_000_000
    parameter_bytes: int = 65_536
    prompt_bytes: int = 4096
    steps: int = 256


DEFAULT_LIMITS = Limits()


def check_prompt(length: int, limits: Limits) -> None:
    if length > limits.prompt_bytes:
        raise LimitExceeded(
            f"the prompt has {length} bytes, more than {limits.prompt_bytes}; raise Limits.prompt_bytes if you trust the file"
        )
