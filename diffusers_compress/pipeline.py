"""What the codecs share: loading, files, the model's identity."""

import functools
import inspect
import json
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, Self, TypedDict

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput
from torch import Tensor
from tqdm import tqdm

from diffusers_compress import hub, images, loading, lossless, quality
from diffusers_compress.arguments import check_output_type, check_rates, permitted_bytes, samples
from diffusers_compress.contract import CODECS, known_numbers, name_of
from diffusers_compress.errors import WrongModel
from diffusers_compress.fingerprint import has_adapters
from diffusers_compress.format.container import Header
from diffusers_compress.format.limits import DEFAULT_LIMITS, Limits
from diffusers_compress.outputs import CompressOutput, RoundTripOutput
from diffusers_compress.quality import Quality

Callback = Callable | PipelineCallback | MultiPipelineCallbacks | None  # as diffusers' pipelines take it
Watch = Callable[[int, int, dict[str, Tensor]], None] | None  # the same for us: of the step's number, its timestep, its tensors


class Rate(TypedDict, total=False):
    """What `compress` of every codec with a rate takes: at most one of these, see `contract.ImageCodec`."""

    target_bpp: float | None
    max_bytes: int | None


class Goal(Rate, total=False):
    """What `compress` of every codec with a `fidelity` takes, see `contract.ImageCodec`."""

    target_psnr: float | None
    target_metric: tuple[str, float] | None
    decoding: dict | None


class Decoding(TypedDict, total=False):
    """What `decompress` of every codec takes, see `contract.ImageCodec`."""

    output_type: str
    allow_other_model: bool
    limits: Limits
    batch_size: int
    num_images_per_prompt: int
    callback_on_step_end: Callback
    callback_on_step_end_tensor_inputs: list[str]


class Picture(NamedTuple):
    """A picture that `compress` makes a file of.

    Args:
        header: its file's, without parameters.
        x: samples [3, H, W] in [-1, 1].
        max_bytes: that its file may have; infinite without a rate in bits.
        notes: what of it the codec does not carry.
    """

    header: Header
    x: Tensor
    max_bytes: float
    notes: list[str]


class Files(NamedTuple):
    """The files that `decompress` makes pictures of, and how.

    Args:
        contents: what the codec read of each, the header first.
        notes: on each file.
    """

    contents: list[Any]
    notes: list[list[str]]
    output_type: str
    limits: Limits
    batch_size: int
    watch: Watch


def undisturbed(call: Callable) -> Callable:
    """Keep autocast, gradients and a default device, which a program may have set, out of `compress` or `decompress`, lest they change
    bytes; and let offloaded models go at its end, whatever that is."""

    @functools.wraps(call)
    def alone(self, *arguments, **options):
        kinds = {"cpu", self._execution_device.type} - {"meta"}  # meta: accelerate holds all weights
        with ExitStack() as settings:
            settings.callback(self.maybe_free_model_hooks)
            settings.enter_context(torch.no_grad())
            for kind in kinds:
                if torch.is_autocast_enabled(kind):
                    settings.enter_context(torch.autocast(kind, enabled=False))
            if torch.get_default_device().type != "cpu":
                settings.enter_context(torch.device("cpu"))
            return call(self, *arguments, **options)

    return alone


def explicit(method: Callable, shared: Callable) -> Callable:
    """The method, with a signature that names what it passes on to `shared` as **: for `help`, and for who asks what it takes."""
    own = inspect.signature(method)
    named = [parameter for parameter in own.parameters.values() if parameter.kind is not parameter.VAR_KEYWORD]
    if len(named) < len(own.parameters):
        passed_on = [
            parameter for parameter in inspect.signature(shared).parameters.values() if parameter.kind is parameter.KEYWORD_ONLY
        ]
        method.__signature__ = own.replace(parameters=[*named, *passed_on])
    return method


def round_trip(codec: type) -> Callable:
    """`__call__` of a codec: `compress`, then `decompress` of those files. It takes the arguments of both; each gets those that it has."""
    sides = [inspect.signature(side).parameters for side in (codec.compress, codec.decompress)]
    compressing, decompressing = (list(side)[2:] for side in sides)  # without self and the image or file
    kinds = {**sides[0], **{name: sides[1][name] for name in decompressing}}
    kinds["return_dict"] = inspect.Parameter("return_dict", inspect.Parameter.KEYWORD_ONLY, default=True, annotation=bool)
    ordered = sorted(kinds.values(), key=lambda parameter: parameter.kind)  # those that have a place before the others
    signature = inspect.Signature(ordered, return_annotation=RoundTripOutput | tuple)

    def call(*arguments, **options):
        given = signature.bind(*arguments, **options).arguments  # TypeError for an argument of neither
        self, image, return_dict = given.pop("self"), given.pop("image"), given.pop("return_dict", True)
        decoding = {name: given[name] for name in decompressing if name in given}
        self.decompress([], **decoding)  # an argument out of its range is refused before the work
        sent = self.compress(image, **{name: given[name] for name in compressing if name in given})
        decoded = self.decompress(sent.bitstreams, **decoding)
        notes = [sent.notes[i // decoding.get("num_images_per_prompt", 1)] + of_file for i, of_file in enumerate(decoded.notes)]
        output = RoundTripOutput(images=decoded.images, bitstreams=sent.bitstreams, bpp=sent.bpp, notes=notes)
        return output if return_dict else output.to_tuple()

    call.__name__, call.__doc__, call.__signature__ = "__call__", round_trip.__doc__, signature
    return call


class CodecMixin:
    """For a `DiffusionPipeline` that codes pictures. Its `compress` and `decompress` run `undisturbed` and have lossless
    files too, `__call__` does both."""

    _callback_tensor_inputs = ["latents", "noise_pred"]

    __call__: Callable[..., RoundTripOutput | tuple]

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        if "compress" in vars(cls):
            has_fidelity = "fidelity" in inspect.signature(cls.compress).parameters
            cls.compress = undisturbed(explicit(cls.compress, cls.read_goal if has_fidelity else cls.read_pictures))
            cls.decompress = undisturbed(explicit(cls.decompress, cls.read_files))
            if "lossless" not in inspect.signature(cls.compress).parameters:
                cls.compress, cls.decompress = lossless.encodes(cls.compress), lossless.decodes(cls.decompress)
            cls.__call__ = round_trip(cls)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **options) -> Self:
        """As diffusers', but weights come from safetensors alone unless the caller says otherwise: other formats can run code.

        Raises:
            FileNotFoundError, ValueError: what `loading.check_folder` finds in the model's folder.
            OSError: the model cannot be had from the Hub, and why.
        """
        model, options = os.fspath(pretrained_model_name_or_path), loading.with_dtypes({"use_safetensors": True, **options})
        wanted = inspect.signature(cls.__init__).parameters.keys() - options.keys()
        if Path(model).is_dir():
            loading.check_folder(Path(model), wanted, options["use_safetensors"])
        elif model.count("/") != 1:
            raise FileNotFoundError(f"{model}: no such model folder")
        with loading.explained(model, options.get("revision")):
            return super().from_pretrained(model, **options)

    @classmethod
    def download(cls, pretrained_model_name: str, **options) -> str:
        """As diffusers', and checked."""
        folder = super().download(pretrained_model_name, **options)
        given = {name for name, part in options.items() if part is not None}
        wanted = inspect.signature(cls.__init__).parameters.keys() - given
        loading.check_folder(Path(folder), wanted, options.get("use_safetensors") is not False)
        return folder

    @classmethod
    def _dict_from_json_file(cls, json_file, **options):
        return hub.known_index(
            super()._dict_from_json_file(json_file, **options), set(inspect.signature(cls.__init__).parameters)
        )

    @classmethod
    def extract_init_dict(cls, config_dict, **kwargs):
        """As diffusers', but what other pipelines or codecs added to the folder is passed over in silence."""
        known = hub.known_index(config_dict, set(inspect.signature(cls.__init__).parameters))
        return super().extract_init_dict(known, **kwargs)

    def to_json_string(self) -> str:
        return json.dumps(hub.tidy_index(json.loads(super().to_json_string())), indent=2, sort_keys=True) + "\n"

    def save_pretrained(self, save_directory: str | os.PathLike, *args: object, push_to_hub: bool = False, **options) -> None:
        """As diffusers', with the files by which `DiffusionPipeline.from_pretrained(..., trust_remote_code=True)` loads it too."""
        with hub.with_loaders(self, Path(save_directory), options, push_to_hub):
            super().save_pretrained(save_directory, *args, **options)

    def push_to_hub(
        self,
        repo_id: str,
        license: str | None = None,
        pictures: Sequence = (),
        rates: Sequence[float] = hub.RATES,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
        **options,
    ) -> str:
        """Share the codec as a repository that `from_pretrained` takes, with a model card. Returns the commit's address.

        Args:
            license: default: that of the model that the pipeline was loaded from, as its card says. ValueError if it does not.
            pictures: for the card's table of rates and PSNR, measured at `rates` bits per pixel; without them it has none.
            options: those of `save_pretrained`, such as variant="fp16".
        """
        return hub.push(self, repo_id, license, pictures, rates, private, token, commit_message, create_pr, **options)

    def enable_group_offload(self, *arguments: object, exclude_modules: str | list[str] | None = None, **options) -> None:
        """As diffusers', but networks that are small and not called by their `forward` stay on the device."""
        exclude = [exclude_modules] if isinstance(exclude_modules, str) else exclude_modules or []
        super().enable_group_offload(*arguments, exclude_modules=[*exclude, *self._exclude_from_cpu_offload], **options)

    # -------------------------------------------------------------------------------------------------- from pictures to files

    def read_pictures(
        self,
        codec: int,
        image: PipelineImageInput,
        own_rates: dict[str, Any] = {},
        *,
        target_bpp: float | None = None,
        max_bytes: int | None = None,
    ) -> list[Picture]:
        """What `compress` starts from. ValueError for rates out of their range, or more or fewer of them than the codec takes."""
        row = CODECS[known_numbers()[codec]]
        check_rates({"target_bpp": target_bpp, "max_bytes": max_bytes, **own_rates}, required=row.rate == "required")
        pictures, identity = [], self.fingerprint()
        for picture in images.as_list(image):
            x, notes = images.to_tensor(picture)
            header = Header(codec, x.shape[2], x.shape[1], identity, b"")
            pictures.append(Picture(header, x, permitted_bytes(header, target_bpp, max_bytes), notes))
        return pictures

    def read_goal(
        self,
        codec: int,
        image: PipelineImageInput,
        fidelity: float | None,
        *,
        target_bpp: float | None = None,
        max_bytes: int | None = None,
        target_psnr: float | None = None,
        target_metric: tuple[str, float] | None = None,
        decoding: dict | None = None,
    ) -> tuple[list[Picture], Quality | None]:
        """As `read_pictures`, and the quality that is wanted in place of a rate."""
        goals = {"fidelity": fidelity, "target_psnr": target_psnr, "target_metric": target_metric}
        pictures = self.read_pictures(codec, image, goals, target_bpp=target_bpp, max_bytes=max_bytes)
        return pictures, quality.wanted(target_psnr, target_metric, decoding)

    # -------------------------------------------------------------------------------------------------- from files to pictures

    def read_files(
        self,
        read: Callable,
        bitstreams: bytes | list[bytes],
        draws: bool = False,
        *,
        output_type: str = "pil",
        allow_other_model: bool = False,
        limits: Limits = DEFAULT_LIMITS,
        batch_size: int = 8,
        num_images_per_prompt: int = 1,
        callback_on_step_end: Callback = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
    ) -> Files:
        """What `decompress` starts from: what read(data, limits) makes of each file, and the rest as it is used. BitstreamError by kind;
        ValueError for an argument out of its range. draws: whether the decoder's pictures differ although files have no seed."""
        check_output_type(output_type)
        watch = self.watch(callback_on_step_end, callback_on_step_end_tensor_inputs)
        files = [read(data, limits) for data in ([bitstreams] if isinstance(bitstreams, (bytes, bytearray)) else bitstreams)]
        files = samples(files, num_images_per_prompt, draws)
        notes = self.check_model([header for header, *_ in files], allow_other_model)
        return Files(files, notes, output_type, limits, batch_size, watch)

    def pictures_of(self, x: Tensor, headers: list[Header], output_type: str) -> list:
        """Decoded samples [B, 3, H, W], about [-1, 1], as pictures of the files' own sizes."""
        return [
            images.to_output(images.crop(picture, header.height, header.width)[None], output_type)[0]
            for picture, header in zip(x, headers)
        ]

    def prediction(self, data: bytes, limits: Limits) -> Tensor | None:
        """A picture [3, H, W] in [-1, 1] of a file, on the CPU, that comes out alike on every machine but for some 1e-12: from it the pixels of
        a lossless file are predicted. None if there is no such picture."""
        return None

    def watch(self, callback: Callback, names: list[str]) -> Watch:
        """`callback_on_step_end` as we call it; ValueError for names of tensors that it cannot have."""
        if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
            names = callback.tensor_inputs
        if unknown := set(names) - set(self._callback_tensor_inputs):
            raise ValueError(f"a callback may have {self._callback_tensor_inputs}, not {sorted(unknown)}")
        if callback is None:
            return None

        def look(step, timestep, tensors):  # both ends must hold the same x_t: what a callback returns counts for nothing
            callback(self, step, timestep, {name: tensors[name].clone() for name in names})

        return look

    def labelled_bar(self, label: str, total: int = 0) -> tqdm:
        """A progress bar that says what it counts, unless `set_progress_bar_config` gave it another name."""
        bar = self.progress_bar(total=total)
        if hasattr(bar, "desc") and not bar.desc:  # not so the command line's own bar, and none that is switched off
            bar.set_description_str(label)
        return bar

    # ------------------------------------------------------------------------------------------------------------ the model

    def fingerprint(self) -> bytes:
        """Four bytes that tell this model from others."""
        raise NotImplementedError

    def networks(self) -> dict[str, torch.nn.Module]:
        """The components that have weights."""
        return {name: part for name, part in self.components.items() if isinstance(part, torch.nn.Module)}

    def earlier_fingerprints(self) -> dict[bytes, str]:
        """Fingerprints that this model had before something was added to it -> words for that."""
        return {}

    @property
    def kind(self) -> str:
        """What a model card calls the model."""
        return type(self).__name__.removesuffix("Pipeline")

    def about(self, header: Header) -> str:
        """What else a user should hear of the model when it is not the file's, after a comma."""
        return ""

    def check_model(self, headers: list[Header], allow_other_model: bool) -> list[list[str]]:
        """WrongModel if a file was made with other weights; if that is allowed, a note for each such file."""
        identity, notes = self.fingerprint(), []
        own = {identity}
        if any(header.fingerprint != identity for header in headers) and has_adapters(self.networks()):
            own.add(self.fingerprint(fused=True))  # the encoder may have fused them
        for header in headers:
            made_with = header.fingerprint
            if made_with not in own and not allow_other_model:
                raise WrongModel(self.mismatch(header, identity))
            other = f"the file was made with model {made_with.hex()}, this is {identity.hex()}: the picture is another"
            notes.append([] if made_with in own else [other])
        return notes

    def mismatch(self, header: Header, identity: bytes) -> str:
        """What a file was made with, what is here, and what to do."""
        made_with, earlier_fingerprints = header.fingerprint, self.earlier_fingerprints()
        here = f"this is model {identity.hex()}{self.about(header)}"
        if made_with in earlier_fingerprints:
            return f"the file was made with this model {earlier_fingerprints[made_with]} ({made_with.hex()}); {here}; load it so"
        return (
            f"the {name_of(header.codec)} file of {header.width}x{header.height} pixels was made with model {made_with.hex()}, {here}; "
            "`diffusers-compress info FILE --find FOLDER` looks for the right one; allow_other_model (--any-model) decodes to another picture"
        )


def compressed(files: list[bytes], pictures: list[Picture]) -> CompressOutput:
    """The output of `compress`."""
    bpp = [8 * len(file) / (picture.header.width * picture.header.height) for file, picture in zip(files, pictures)]
    return CompressOutput(bitstreams=files, bpp=bpp, notes=[picture.notes for picture in pictures])


def check_finite(x: Tensor, what: str) -> Tensor:
    """The tensor; ValueError if it holds inf or nan."""
    if not x.abs().max() < float("inf"):  # nor nan
        raise ValueError(f"{what} is not finite; load the model with dtype float32 or bfloat16")
    return x


def groups_of(batch_size: int, shapes: list) -> list[list[int]]:
    """Indices of equal shapes, in batches."""
    by_shape = {}
    for i, shape in enumerate(shapes):
        by_shape.setdefault(shape, []).append(i)
    return [same[k : k + batch_size] for same in by_shape.values() for k in range(0, len(same), batch_size)]
