"""The base of a refined file: by a codec of today, or by another codec of `contract.CODECS` on the same model."""

import inspect
from typing import Any

from diffusers import DiffusionPipeline
from torch import Tensor

from diffusers_compress import images
from diffusers_compress.codecs.refine.format import LEARNED, Parameters
from diffusers_compress.contract import CODECS
from diffusers_compress.errors import Corrupt
from diffusers_compress.format.container import Header
from diffusers_compress.images import formats

NAMES = (*formats.FORMATS, *LEARNED)


def learned(pipe: DiffusionPipeline, base: str) -> Any:
    """The codec on the pipeline's own model, with what its folder has for it; None for a codec of today. ValueError for a model that was
    trained to refine: its network is another, so that nobody else could read the base."""
    if base not in LEARNED:
        return None
    if pipe.config.form:
        raise ValueError(
            f"base {base!r} needs a model as it was published; this one was trained to refine {', '.join(formats.FORMATS)}"
        )
    kind = CODECS[base].pipeline_class()
    known, source = inspect.signature(kind).parameters, pipe.config.get("_name_or_path")
    shared = {name: part for name, part in pipe.components.items() if name in known and part is not None}
    if not source:
        return kind(**shared)
    codec = kind.from_pretrained(source, **shared, dtype=pipe.denoiser.dtype)
    codec.set_progress_bar_config(disable=True)
    for name in codec.components.keys() - shared.keys():
        if getattr(codec, name) is not None:
            getattr(codec, name).to(pipe._execution_device)
    return codec


def encoded(base: str, codec: Any, x: Tensor, fidelity: float | None, limit: float, overhead: int) -> bytes:
    """The file of x [3, H, W] at this place of the base's scale, or the largest that leaves `overhead` of `limit` bytes. ValueError if there
    is none. codec: of `learned`."""
    picture = images.to_output(x[None])[0]
    if codec is None:
        return formats.encoded(base, picture, fidelity, limit, overhead)
    rate = {"max_bytes": int(limit) - overhead} if fidelity is None else {"fidelity": fidelity}
    return codec.compress(picture, **rate).bitstreams[0]


def decoded(base: str, codec: Any, data: bytes, size: tuple[int, int] | None = None) -> Tensor:
    """The picture [3, H, W] in [-1, 1] of such a file, with 8 bits a sample, as its own codec shows it: of a learned one, its preview.

    Corrupt for a file that is damaged or has another width and height than `size`; BitstreamError for other faults of a learned base.
    """
    if codec is None:
        try:
            return formats.as_stored(formats.opened(base, data, size))
        except ValueError as error:
            raise Corrupt(str(error)) from error
    facts = CODECS[base].format_module().describe(data)
    if size not in (None, (facts["width"], facts["height"])):
        raise Corrupt(f"the base has {facts['width']}x{facts['height']} pixels, not {size[0]}x{size[1]}")
    return formats.as_stored(codec.decompress(data, **CODECS[base].preview).images[0])


def picture(pipe: DiffusionPipeline, header: Header, parameters: Parameters, data: bytes) -> Tensor:
    """The base of a refined file, by `decoded`."""
    return decoded(parameters.base, learned(pipe, parameters.base), data, (header.width, header.height))
