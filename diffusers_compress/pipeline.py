"""What the codecs on latent diffusion models share: the network's inputs and outputs, the autoencoder, the model's identity."""

import functools
import inspect
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Self

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput
from torch import Tensor
from tqdm import tqdm

from diffusers_compress import hub, images, loading
from diffusers_compress.contract import name_of
from diffusers_compress.diffusion import families, schedule, solvers
from diffusers_compress.diffusion.families.stable_diffusion import StableDiffusion
from diffusers_compress.errors import WrongModel
from diffusers_compress.fingerprint import fingerprint, has_adapters
from diffusers_compress.format.container import Header
from diffusers_compress.format.limits import Limits
from diffusers_compress.outputs import CompressOutput, RoundTripOutput

# What a pipeline may lack: families differ in their components, and most models have none of ours.
FAMILY_COMPONENTS = [
    *("vae", "text_encoder", "tokenizer", "unet", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3", "transformer")
]


Watch = Callable[[int, int, dict[str, Tensor]], None] | None


def undisturbed(call: Callable) -> Callable:
    """Keep autocast, gradients and a default device, which a program may have set, out of `compress` or `decompress`, lest they change
    bytes; and let offloaded models go at its end, whatever that is."""

    @functools.wraps(call)
    def alone(self, *arguments, **options):
        kinds = {"cpu", self._execution_device.type}
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


def round_trip(codec: type) -> Callable:
    """`__call__` of a codec: `compress`, then `decompress` of those files. It takes the arguments of both; each gets those that it has."""
    sides = [inspect.signature(side).parameters for side in (codec.compress, codec.decompress)]
    compressing, decompressing = (list(side)[2:] for side in sides)  # without self and the image or file
    kinds = {**sides[0], **{name: sides[1][name] for name in decompressing}}
    kinds["return_dict"] = inspect.Parameter("return_dict", inspect.Parameter.KEYWORD_ONLY, default=True, annotation=bool)
    signature = inspect.Signature(list(kinds.values()), return_annotation=RoundTripOutput | tuple)

    def call(*arguments, **options):
        given = signature.bind(*arguments, **options).arguments  # TypeError for an argument of neither
        self, image, return_dict = given.pop("self"), given.pop("image"), given.pop("return_dict", True)
        decoding = {name: given[name] for name in decompressing if name in given}
        self.decompress([], **decoding)  # an argument out of its range is refused before the work
        sent = self.compress(image, **{name: given[name] for name in compressing if name in given})
        decoded = self.decompress(sent.bitstreams, **decoding)
        notes = [of_picture + of_file for of_picture, of_file in zip(sent.notes, decoded.notes)]
        output = RoundTripOutput(images=decoded.images, bitstreams=sent.bitstreams, bpp=sent.bpp, notes=notes)
        return output if return_dict else output.to_tuple()

    call.__name__, call.__doc__, call.__signature__ = "__call__", round_trip.__doc__, signature
    return call


class LatentCodecMixin:
    """For a `DiffusionPipeline` with a scheduler and the components of one of `families.FAMILIES`."""

    _callback_tensor_inputs = ["latents", "noise_pred"]
    _exclude_from_cpu_offload = ["hyperprior", "parameter_network", "hyper_encoder"]  # small, and read outside their forward
    model_cpu_offload_seq = "text_encoder->text_encoder_2->text_encoder_3->unet->transformer->vae"

    __call__: Callable[..., RoundTripOutput | tuple]

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        if "compress" in vars(cls):
            cls.__call__ = round_trip(cls)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **options) -> Self:
        """As diffusers', but weights come from safetensors alone unless the caller says otherwise: other formats can run code.

        Raises:
            FileNotFoundError, ValueError: what `loading.check_folder` finds in the model's folder.
            OSError: the model cannot be had from the Hub, and why.
        """
        model, options = os.fspath(pretrained_model_name_or_path), {"use_safetensors": True, **options}
        wanted = inspect.signature(cls.__init__).parameters.keys() - options.keys()
        if Path(model).is_dir():
            loading.check_folder(Path(model), wanted, options["use_safetensors"])
        elif model.count("/") != 1:
            raise FileNotFoundError(f"{model}: no such model folder")
        try:
            return super().from_pretrained(model, **options)
        except OSError as error:
            if (reason := loading.reason(error, model, options.get("revision"))) is None:
                raise
        raise OSError(reason)

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

    # -------------------------------------------------------------------------------------------------- from pictures to files

    def read_pictures(self, image: PipelineImageInput, codec: int) -> tuple[list[Header], list[Tensor], list[list[str]]]:
        """Of each picture the header without parameters, its samples [3, H, W] in [-1, 1], and what the codec does not carry."""
        read, identity = [images.to_tensor(picture) for picture in images.as_list(image)], self.fingerprint()
        headers = [Header(codec, x.shape[2], x.shape[1], identity, b"") for x, _ in read]
        return headers, [x for x, _ in read], [notes for _, notes in read]

    def encode_groups(self, tensors: list[Tensor], batch_size: int) -> Iterator[tuple[list[int], Tensor]]:
        """Pictures of like size, in batches: their indices i, and their scaled latents [B, C, h, w]."""
        for group in groups_of(batch_size, [self.latent_shape(*x.shape[1:]) for x in tensors]):
            yield group, torch.cat([self.encode_picture(self.pad(tensors[i])[None]) for i in group])

    # -------------------------------------------------------------------------------------------------- from files to pictures

    def read_files(
        self, read: Callable, bitstreams: bytes | list[bytes], limits: Limits, allow_other_model: bool
    ) -> tuple[list, list[list[str]]]:
        """What read(data, limits) makes of each file, the header first, and notes on the files. BitstreamError by kind."""
        files = [read(data, limits) for data in ([bitstreams] if isinstance(bitstreams, (bytes, bytearray)) else bitstreams)]
        return files, self.check_model([header for header, *_ in files], allow_other_model)

    def pictures_of(self, x: Tensor, headers: list[Header], output_type: str) -> list:
        """Decoded samples [B, 3, H, W], about [-1, 1], as pictures of the files' own sizes."""
        return [
            images.to_output(images.crop(picture, header.height, header.width)[None], output_type)[0]
            for picture, header in zip(x, headers)
        ]

    # ------------------------------------------------------------------------------------------------------------ the network

    def watch(self, callback: Callable | None, names: list[str]) -> Watch:
        """`callback_on_step_end` as a function of (number of the step, timestep, tensors); ValueError for names that it cannot have."""
        if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
            names = callback.tensor_inputs
        if unknown := set(names) - set(self._callback_tensor_inputs):
            raise ValueError(f"a callback may have {self._callback_tensor_inputs}, not {sorted(unknown)}")
        if callback is None:
            return None

        def look(step, timestep, tensors):  # both ends must hold the same x_t: what a callback returns counts for nothing
            callback(self, step, timestep, {name: tensors[name].clone() for name in names})

        return look

    def run(
        self,
        walks: list[solvers.Walk],
        prompts: list[str],
        guidance_scale: float = 1.0,
        watch: Watch = None,
        extra_channels: Tensor | None = None,
    ) -> list:
        """Let the walks of `solvers.run` share the network, each with its prompt."""
        return self.with_network(lambda network: solvers.run(walks, network), prompts, guidance_scale, watch, extra_channels)

    def with_network(
        self,
        loop: Callable,
        prompts: list[str],
        guidance_scale: float = 1.0,
        watch: Watch = None,
        extra_channels: Tensor | None = None,
    ) -> list:
        """loop(network), where network(x_t [B, C, h, w], t [B], i [B]) is the denoiser's output for pictures i, each with its prompt.

        extra_channels: that the denoiser sees of each picture beside x_t, guided or not.
        """
        conditioning = self.encode_prompt(prompts)
        empty = self.encode_prompt([""] * len(prompts)) if guidance_scale > 1 and any(prompts) else None
        step = 0
        with self.labelled_bar("network calls") as bar:

            def network(x_t, timesteps, active):
                nonlocal step
                seen = x_t if extra_channels is None else torch.cat([x_t, extra_channels[active]], 1)
                output = self.predict(seen, timesteps, {name: rows[active] for name, rows in conditioning.items()})
                if empty is not None:
                    # Ho & Salimans 2022, classifier-free guidance
                    unguided = self.predict(seen, timesteps, {name: rows[active] for name, rows in empty.items()})
                    output = unguided + guidance_scale * (output - unguided)
                check_finite(output, f"the model's output at timestep {max(timesteps)}")
                bar.update()
                if watch is not None:
                    watch(step, max(timesteps), {"latents": x_t, "noise_pred": output})
                step += 1
                return output

            return loop(network)

    def labelled_bar(self, label: str, total: int = 0) -> tqdm:
        """A progress bar that says what it counts, unless `set_progress_bar_config` gave it another name."""
        bar = self.progress_bar(total=total)
        if not getattr(bar, "desc", None):
            bar.set_description_str(label)
        return bar

    @property
    def family(self) -> StableDiffusion:
        """What is particular to this kind of model. ValueError if it is of no known kind."""
        return families.family_of(self)

    @property
    def denoiser(self) -> torch.nn.Module:
        """The network that is called at each step: a UNet or a transformer."""
        return getattr(self, self.family.network)

    def noise_schedule(self) -> schedule.NoiseSchedule:
        """The levels of the model, by its scheduler. ValueError if this is for another kind of diffusion."""
        noise, family = schedule.from_scheduler(self.scheduler), self.family
        if (noise.prediction_type == schedule.FLOW) != family.flow:
            kind, example = ("flow matching", "FlowMatchEuler") if family.flow else ("variance-preserving diffusion", "DDIM")
            name = f"{type(self.scheduler).__name__} with prediction_type {noise.prediction_type}"
            raise ValueError(
                f"a {type(family).__name__} model is trained by {kind}; set pipe.scheduler to {example}Scheduler, not {name}"
            )
        return noise

    def predict(self, x_t: Tensor, timesteps: list[int], conditioning: dict[str, Tensor]) -> Tensor:
        """The denoiser's output [B, C, h, w] in float32 for x_t [B, C, h, w] at one timestep each."""
        return self.family.predict(x_t, timesteps, conditioning)

    def encode_prompt(self, prompts: list[str]) -> dict[str, Tensor]:
        """The denoiser's conditioning on B prompts: tensors [B, ...] by name, for `predict`."""
        return self.family.encode_prompt(prompts)

    def pad(self, x: Tensor) -> Tensor:
        """Pictures [..., H, W] with sides that the model can take: the last row and column repeated."""
        return images.pad(x, self.vae_scale_factor * self.family.patch)

    def encode_picture(self, x: Tensor) -> Tensor:
        """Padded pictures [B, 3, H, W] in [-1, 1] to scaled latents [B, C, h, w] in float32: the mean, not a draw.

        The autoencoder has one picture at a time: it takes most of the memory, and gains little from a batch.
        """
        x_0 = torch.cat([self.family.encode_picture(picture) for picture in x.split(1)])
        return check_finite(x_0, "the autoencoder's output")

    def decode_latent(self, x_0: Tensor) -> Tensor:
        """Scaled latents [B, C, h, w] to pictures [B, 3, H, W] in float32, about [-1, 1], one at a time."""
        x = torch.cat([self.family.decode_latent(latent) for latent in x_0.split(1)])
        return check_finite(x, "the model's output")

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """[C, h, w] of a picture's latent."""
        family = self.family
        rows, columns = (-(-side // (self.vae_scale_factor * family.patch)) * family.patch for side in (height, width))
        return family.channels, rows, columns

    def fingerprint(self, own_components: dict | None = None, own_config: dict | None = None, fused: bool = False) -> bytes:
        """Four bytes that tell this model from others: signs of the weights, noise schedule, scale of the latents, words that were
        added to the tokenizer, a codec's own. fused: as if `fuse_lora` had been called on the active adapters."""
        family, config = self.family, self.scheduler.config
        if family.flow:
            levels = {"num_train_timesteps": config.num_train_timesteps, "prediction_type": schedule.FLOW}
        else:
            names = ["num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type"]
            levels = {name: config.get(name) for name in names}
            levels["rescale_betas_zero_snr"] = bool(config.get("rescale_betas_zero_snr"))
        config = levels | family.identity() | self.added_words() | (own_config or {})
        return fingerprint(self.networks() | (own_components or {}), config, fused)

    def networks(self) -> dict[str, torch.nn.Module]:
        """The components of the family that have weights."""
        parts = {name: getattr(self, name) for name in (*self.family.parts, *self.family.optional)}
        return {name: part for name, part in parts.items() if isinstance(part, torch.nn.Module)}

    def added_words(self) -> dict[str, dict[str, int]]:
        """By tokenizer, the words that textual inversion or the user added to it, with their numbers; {} if there are none."""
        found = {}
        for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
            added = getattr(getattr(self, name, None), "added_tokens_decoder", {})
            found[name] = {token.content: number for number, token in added.items() if not token.special}
        return {name: words for name, words in found.items() if words}

    def earlier_fingerprints(self) -> dict[bytes, str]:
        """Fingerprints that this model had before something was added to it -> words for that."""
        return {}

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
        here = f"this is model {identity.hex()}, with latents of {list(self.latent_shape(header.height, header.width))} here"
        if made_with in earlier_fingerprints:
            return f"the file was made with this model {earlier_fingerprints[made_with]} ({made_with.hex()}); {here}; load it so"
        return (
            f"the {name_of(header.codec)} file of {header.width}x{header.height} pixels was made with model {made_with.hex()}, {here}; "
            "`diffusers-compress info FILE --find FOLDER` looks for the right one; allow_other_model (--any-model) decodes to another picture"
        )


def compressed(files: list[bytes], headers: list[Header], notes: list[list[str]]) -> CompressOutput:
    """The output of `compress`."""
    bpp = [8 * len(file) / (header.width * header.height) for file, header in zip(files, headers)]
    return CompressOutput(bitstreams=files, bpp=bpp, notes=notes)


def check_finite(x: Tensor, what: str) -> Tensor:
    """The tensor; ValueError if it holds inf or nan."""
    if not x.isfinite().all():
        raise ValueError(f"{what} is not finite; load the model with dtype float32 or bfloat16")
    return x


def groups_of(batch_size: int, shapes: list) -> list[list[int]]:
    """Indices of equal shapes, in batches."""
    by_shape = {}
    for i, shape in enumerate(shapes):
        by_shape.setdefault(shape, []).append(i)
    return [same[k : k + batch_size] for same in by_shape.values() for k in range(0, len(same), batch_size)]
