"""What the codecs on latent diffusion models share: the network's inputs and outputs, the autoencoder, the model's identity."""

import functools
import inspect
import json
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Self

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Tensor

from diffusers_compress import hub, images, loading
from diffusers_compress.contract import name_of
from diffusers_compress.diffusion import families, schedule, solvers
from diffusers_compress.diffusion.families.stable_diffusion import StableDiffusion
from diffusers_compress.errors import WrongModel
from diffusers_compress.fingerprint import fingerprint, has_adapters
from diffusers_compress.format.container import Header
from diffusers_compress.outputs import RoundTripOutput

# What a pipeline may lack: families differ in their components, and most models have none of ours.
FAMILY_COMPONENTS = [
    *("vae", "text_encoder", "tokenizer", "unet", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3", "transformer")
]


def undisturbed(call: Callable) -> Callable:
    """Keep autocast, gradients and a default device, which a program may have set, out of a call, lest they change bytes."""

    @functools.wraps(call)
    def alone(self, *arguments, **options):
        kinds = {"cpu", self._execution_device.type}
        with ExitStack() as settings:
            settings.enter_context(torch.no_grad())
            for kind in kinds:
                if torch.is_autocast_enabled(kind):
                    settings.enter_context(torch.autocast(kind, enabled=False))
            if torch.get_default_device().type != "cpu":
                settings.enter_context(torch.device("cpu"))
            return call(self, *arguments, **options)

    return alone


def watched(call: Callable) -> Callable:
    """Let `callback_on_step_end`, an argument of `compress` or `decompress`, see each step of the call."""
    signature = inspect.signature(call)

    @functools.wraps(call)
    def with_callback(self, *arguments, **options):
        given = signature.bind(self, *arguments, **options)
        given.apply_defaults()
        callback, names = (given.arguments["callback_on_step_end" + end] for end in ("", "_tensor_inputs"))
        if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
            names = callback.tensor_inputs
        if unknown := set(names) - set(self._callback_tensor_inputs):
            raise ValueError(f"a callback may have {self._callback_tensor_inputs}, not {sorted(unknown)}")
        self._watch = callback, names
        try:
            return call(self, *arguments, **options)
        finally:
            self._watch = None, []

    return with_callback


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
    _watch = None, []  # callback, and what it is given
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

    def run(self, walks: list[solvers.Walk], prompts: list[str], guidance_scale: float = 1.0) -> list:
        """Let the walks of `solvers.run` share the network, each with its prompt."""
        return self.with_network(lambda network: solvers.run(walks, network), prompts, guidance_scale)

    def with_network(self, loop: Callable, prompts: list[str], guidance_scale: float = 1.0, beside: Tensor | None = None) -> list:
        """loop(network), where network(x_t [B, C, h, w], t [B], i [B]) is the denoiser's output for pictures i, each with its prompt.

        beside: further channels that the denoiser sees of each picture, guided or not.
        """
        told = self.encode_prompt(prompts)
        empty = self.encode_prompt([""] * len(prompts)) if guidance_scale > 1 and any(prompts) else None
        callback, names = self._watch
        step = 0
        with self.progress_bar(total=0) as bar:

            def network(x_t, timesteps, active):
                nonlocal step
                seen = x_t if beside is None else torch.cat([x_t, beside[active]], 1)
                output = self.predict(seen, timesteps, {name: rows[active] for name, rows in told.items()})
                if empty is not None:
                    # Ho & Salimans 2022, classifier-free guidance
                    unguided = self.predict(seen, timesteps, {name: rows[active] for name, rows in empty.items()})
                    output = unguided + guidance_scale * (output - unguided)
                bar.update()
                if callback is not None:  # both ends must hold the same x_t: what it returns counts for nothing
                    tensors = {"latents": x_t, "noise_pred": output}
                    callback(self, step, max(timesteps), {name: tensors[name].clone() for name in names})
                step += 1
                return output

            return loop(network)

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

    def predict(self, x_t: Tensor, timesteps: list[int], told: dict[str, Tensor]) -> Tensor:
        """The denoiser's output [B, C, h, w] in float32 for x_t [B, C, h, w] at one timestep each."""
        return self.family.predict(x_t, timesteps, told)

    def encode_prompt(self, prompts: list[str]) -> dict[str, Tensor]:
        """What the denoiser is told of B prompts: tensors [B, ...] by name, for `predict`."""
        return self.family.encode_prompt(prompts)

    def pad(self, x: Tensor) -> Tensor:
        """Pictures [..., H, W] with sides that the model can take: the last row and column repeated."""
        return images.pad(x, self.vae_scale_factor * self.family.patch)

    def encode_picture(self, x: Tensor) -> Tensor:
        """Padded pictures [B, 3, H, W] in [-1, 1] to scaled latents [B, C, h, w] in float32: the mean, not a draw."""
        return self.family.encode_picture(x)

    def decode_latent(self, x_0: Tensor) -> Tensor:
        """Scaled latents [B, C, h, w] to pictures [B, 3, H, W] in float32, about [-1, 1]."""
        x = self.family.decode_latent(x_0)
        if not x.isfinite().all():
            raise ValueError("the model's output is not finite; load it with dtype float32 or bfloat16")
        return x

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

    def relatives(self) -> dict[bytes, str]:
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
        made_with, relatives = header.fingerprint, self.relatives()
        here = f"this is model {identity.hex()}, with latents of {list(self.latent_shape(header.height, header.width))} here"
        if made_with in relatives:
            return f"the file was made with this model {relatives[made_with]} ({made_with.hex()}); {here}; load it so"
        return (
            f"the {name_of(header.codec)} file of {header.width}x{header.height} pixels was made with model {made_with.hex()}, {here}; "
            "`diffusers-compress info FILE --find FOLDER` looks for the right one; allow_other_model (--any-model) decodes to another picture"
        )


def check_rate_and_prompts(target_bpp, max_bytes, fidelity, prompts, pictures, max_prompt_bytes):
    """ValueError unless there is exactly one rate, in its range, and a prompt of permitted length for each picture."""
    rates = {"target_bpp": target_bpp, "max_bytes": max_bytes, "fidelity": fidelity}
    given = [name for name, value in rates.items() if value is not None]
    if len(given) != 1:
        raise ValueError(f"give exactly one of target_bpp, max_bytes and fidelity; given: {', '.join(given) or 'none'}")
    if not rates[given[0]] > 0:
        raise ValueError(f"{given[0]} must be above 0, not {rates[given[0]]}")
    if fidelity is not None and fidelity > 1:
        raise ValueError(f"fidelity must be in (0, 1], not {fidelity}")
    if len(prompts) != len(pictures):
        raise ValueError(f"{len(prompts)} prompts were given for {len(pictures)} pictures")
    if any(len(prompt.encode()) > max_prompt_bytes for prompt in prompts):
        raise ValueError(f"a prompt may have at most {max_prompt_bytes} bytes")


def check_output(num_inference_steps, output_type):
    """ValueError for an argument of `decompress` out of its range."""
    if num_inference_steps < 1:
        raise ValueError(f"num_inference_steps must be at least 1, not {num_inference_steps}")
    if output_type not in ("pil", "np", "pt"):
        raise ValueError(f"output_type must be 'pil', 'np' or 'pt', not {output_type!r}")


def groups_of(batch_size, shapes):
    """Indices of equal shapes, in batches."""
    by_shape = {}
    for i, shape in enumerate(shapes):
        by_shape.setdefault(shape, []).append(i)
    return [same[k : k + batch_size] for same in by_shape.values() for k in range(0, len(same), batch_size)]
