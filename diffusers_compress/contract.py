"""The contract of a codec, and the table of all codecs. A new codec is one row here, its pipeline and its format.

Nothing here imports torch, or anything that takes long: a row names modules, which are imported when they are used. Shared code reads the
table and names no codec.
"""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

if TYPE_CHECKING:
    from diffusers_compress.outputs import CompressOutput, DecompressOutput

DIFFC, RELIC, PERCO, UQDM, REFINE, TEXT_SKETCH, CDC = range(1, 8)
LOSSLESS = 128  # added to a codec's number in the header of a lossless file


class Codec(NamedTuple):
    """What shared code knows of a codec.

    Args:
        number: in the header of its files, 1 to 127.
        name: as people read it.
        pipeline: "module:class" of its `ImageCodec`.
        format: module with `describe(data, limits)`, the facts of a file as plain values, without torch.
        embedded: folder of its small model in `embedded/`.
        rate: "required": `compress` takes exactly one rate; "cap": at most one, since the model decides the rate; "none": no rate.
        presets: whether `from_pretrained` takes a `preset`, a name or bits per pixel, because a model folder has several rates.
        regions: whether `compress` takes `importance`.
        preview: arguments of `decompress` for a quick picture; none if the codec has no such thing.
    """

    number: int
    name: str
    pipeline: str
    format: str
    embedded: str = "model"
    rate: Literal["required", "cap", "none"] = "required"
    presets: bool = False
    regions: bool = False
    preview: dict[str, Any] = {}

    def embedded_model(self) -> str:
        return str(Path(__file__).parent / "embedded" / self.embedded)

    def pipeline_class(self) -> Any:
        """The class, an `ImageCodec` with diffusers' `from_pretrained`."""
        from pkgutil import resolve_name

        return resolve_name(self.pipeline)

    def format_module(self) -> ModuleType:
        return import_module(self.format)


# The first is the default.
CODECS = {
    "diffc": Codec(
        DIFFC,
        "DiffC",
        "diffusers_compress.pipelines.diffc:DiffCPipeline",
        "diffusers_compress.codecs.diffc.format",
        regions=True,
        preview={"reconstruction": "denoised", "realism": 0.0},
    ),
    "relic": Codec(
        RELIC,
        "Relic",
        "diffusers_compress.pipelines.relic:RelicPipeline",
        "diffusers_compress.codecs.relic.format",
        regions=True,
        preview={"preview": True},
    ),
    "perco": Codec(
        PERCO,
        "PerCo",
        "diffusers_compress.pipelines.perco:PerCoPipeline",
        "diffusers_compress.codecs.perco.format",
        embedded="perco",
        rate="cap",
        presets=True,
    ),
    "uqdm": Codec(
        UQDM,
        "UQDM",
        "diffusers_compress.pipelines.uqdm:UQDMPipeline",
        "diffusers_compress.codecs.uqdm.format",
        embedded="uqdm",
        rate="cap",
        preview={"reconstruction": "denoised"},
    ),
    "cdc": Codec(
        CDC,
        "CDC",
        "diffusers_compress.pipelines.cdc:CDCPipeline",
        "diffusers_compress.codecs.cdc.format",
        embedded="cdc",
        rate="cap",
        preview={"preview": True},
    ),
    "text-sketch": Codec(
        TEXT_SKETCH,
        "TextSketch",
        "diffusers_compress.pipelines.text_sketch:TextSketchPipeline",
        "diffusers_compress.codecs.text_sketch.format",
        embedded="text_sketch",
        rate="cap",
        preview={"num_inference_steps": 1},
    ),
    "refine": Codec(
        REFINE,
        "Refine",
        "diffusers_compress.pipelines.refine:RefinePipeline",
        "diffusers_compress.codecs.refine.format",
        embedded="refine",
        preview={"preview": True},
    ),
}
DEFAULT = next(iter(CODECS))


class ImageCodec(Protocol):
    """A pipeline of diffusers that is an image codec. `options` are the codec's own; what it does not list it refuses."""

    def compress(self, image: Any, *, batch_size: int = 8, **options: Any) -> "CompressOutput":
        """Pictures to files. Options that shared code may pass: the rate (`target_bpp`, `max_bytes`, `fidelity`) and `prompt`.

        Args:
            image: a PIL picture, numpy array [H, W, C] or tensor [C, H, W] (see `images.to_tensor`), or a list of them, any sizes.
            target_bpp: bits per pixel that no file exceeds, 8 * bytes / (width * height).
            max_bytes: size in bytes that no file exceeds.
            fidelity: in (0, 1], on the codec's own scale.
            target_psnr: in dB, that the decoded picture reaches by a file that is as small as can be found.
            target_metric: (name, value) of another metric in place of that, a name of `quality.NAMES` such as "lpips" or "wd".
            decoding: arguments of `decompress` that the receiver will use: a target is that of the picture decoded so.
            importance: where the bits go, of codecs that can choose, see `importance.maps_of`.
            prompt: one for all or one for each picture.
            lossless: let the file hold every pixel; unless the codec does that itself, the rate is that of the lossy file within.
            batch_size: pictures of like size that go through the networks together at most.

        Raises:
            ValueError: for an argument out of its range, or a size that the picture's smallest file exceeds.
        """
        ...

    def decompress(
        self,
        bitstreams: bytes | list[bytes],
        *,
        limits: Any = ...,
        allow_other_model: bool = False,
        batch_size: int = 8,
        output_type: str = "pil",
        num_images_per_prompt: int = 1,
        **options: Any,
    ) -> "DecompressOutput":
        """Files to pictures of their original sizes.

        Args:
            bitstreams: one file or a list.
            limits: sizes that a file may claim.
            allow_other_model: decode although the file was made with other weights, to another picture.
            batch_size: files of like size that go through the networks together at most.
            output_type: "pil", "np" or "pt".
            num_images_per_prompt: pictures of each file, which follow one another in the output: of seeds s, s + 1, ... if the file holds a
                seed s, else by a decoder that draws at random. Any other decoder refuses more than 1.
            callback_on_step_end: called after each network call with the pipeline, the step's number, its noisiest timestep and the
                tensors that `callback_on_step_end_tensor_inputs` names: "latents", x_t, and "noise_pred", the network's output. What it
                returns counts for nothing.

        Raises:
            BitstreamError: `NotABitstream`, `UnsupportedVersion`, `Corrupt`, `WrongModel`, `LimitExceeded`.
        """
        ...

    def fingerprint(self) -> bytes:
        """Four bytes that tell this model from others."""
        ...


def known_numbers() -> dict[int, str]:
    """Number in the header -> key in `CODECS`."""
    return {codec.number: key for key, codec in CODECS.items()}


def name_of(number: int) -> str:
    """A codec as people read it, known here or not."""
    known, number = known_numbers(), number % LOSSLESS
    return CODECS[known[number]].name if number in known else f"codec number {number}"


def key_of(pipe: object) -> str:
    """The key in `CODECS` of a pipeline, by its class's name: its file may have been loaded from another place. ValueError if none."""
    for key, codec in CODECS.items():
        if codec.pipeline.endswith(f":{type(pipe).__name__}"):
            return key
    raise ValueError(f"{type(pipe).__name__} is none of the codecs {', '.join(CODECS)}")


def unknown_options(function: Callable, names: list[str]) -> list[str]:
    """Those of the names that are no arguments of the function."""
    from inspect import signature

    return [name for name in names if name not in signature(function).parameters]
