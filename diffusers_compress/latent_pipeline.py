"""What the codecs on latent diffusion models share: the network's inputs and outputs, the autoencoder, the model's identity."""

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import diffusers
import torch
from torch import Tensor

from diffusers_compress import images
from diffusers_compress.diffusion import families, schedule, solvers
from diffusers_compress.diffusion.families.stable_diffusion import StableDiffusion
from diffusers_compress.diffusion.finishers import Finisher
from diffusers_compress.diffusion.realism import blend, dial, share_of_second_guess
from diffusers_compress.fingerprint import fingerprint
from diffusers_compress.format.container import Header
from diffusers_compress.importance import Importance, maps_of, on_latent
from diffusers_compress.pipeline import CodecMixin, Picture, Watch, check_finite, groups_of

# What a pipeline may lack: families differ in their components, and most models have none of ours.
FAMILY_COMPONENTS = [
    *("vae", "text_encoder", "tokenizer", "unet", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3", "transformer")
]

# Options of `from_pretrained` that say where a model is.
HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")


class LatentCodecMixin(CodecMixin):
    """With a scheduler and the components of one of `families.FAMILIES`."""

    _exclude_from_cpu_offload = ["hyperprior", "parameter_network", "hyper_encoder"]  # small, and read outside their forward
    plain_network = True  # or one that sees more channels than its family's
    model_cpu_offload_seq = "text_encoder->text_encoder_2->text_encoder_3->unet->transformer->vae"

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **options) -> Self:
        """As diffusers', but a network that no family knows is refused by its config, before any weights are fetched. ValueError."""
        model = os.fspath(pretrained_model_name_or_path)
        if Path(model).is_dir() or model.count("/") == 1:
            with suppress(OSError):  # what is wrong with a model that cannot be had, is said below
                cls.check_networks(model, options)
        return super().from_pretrained(model, **options)

    @classmethod
    def check_networks(cls, model: str, options: dict) -> None:
        """Look at the networks of a folder or a repository that are not given as options. ValueError if no family has such."""
        source = {name: options[name] for name in HUB if name in options}
        index = cls.load_config(model, **source)
        for name, network in families.check_index(index, options).items():
            if cls.plain_network and not index.get("form"):  # that is of a network which was trained to refine
                config = getattr(diffusers, network).load_config(model, subfolder=name, **source)
                families.check_config(network, config, str(index.get("_class_name")))

    @classmethod
    def extract_init_dict(cls, config_dict, **kwargs):
        families.check_index(config_dict, kwargs)  # of a folder that a `DiffusionPipeline` with `custom_pipeline=` loads
        return super().extract_init_dict(config_dict, **kwargs)

    def encode_groups(self, pictures: list[Picture], batch_size: int) -> Iterator[tuple[list[int], Tensor]]:
        """Pictures of like size, in batches: their indices i, and their scaled latents [B, C, h, w]."""
        for group in groups_of(batch_size, [self.latent_shape(*picture.x.shape[1:]) for picture in pictures]):
            yield group, torch.cat([self.encode_picture(self.pad(pictures[i].x)[None]) for i in group])

    def finish(
        self,
        ends: list[tuple[Tensor, int]],
        prompts: list[str],
        num_steps: int | list[int],
        realism: float = 1.0,
        guidance_scale: float = 1.0,
        watch: Watch = None,
        finisher: Finisher | None = None,
    ) -> Tensor:
        """From each x_t [1, C, h, w] at timestep t, where a file ends, to x_0 [B, C, h, w]: by the probability-flow ODE or a finisher.

        num_steps: of the network, for all or for each.
        """
        noise, counts = self.noise_schedule(), num_steps if isinstance(num_steps, list) else [num_steps] * len(ends)
        if finisher is None or realism == 0:
            walks = [solvers.solve(x_t, t, count, noise, self.scheduler) for (x_t, t), count in zip(ends, counts)]
            walks = [self.dial(walk, realism, noise, t) for walk, (_, t) in zip(walks, ends)]
            return torch.cat(self.run(walks, prompts, guidance_scale, watch))
        ways = [finisher.way(t, count) for (_, t), count in zip(ends, counts)]
        x_s = [x_t for x_t, _ in ends]
        if any(len(way) > 1 for way, _ in ways):
            leads = [solvers.follow(x_t, way, noise) for x_t, (way, _) in zip(x_s, ways)]
            x_s = self.run(leads, prompts, guidance_scale, watch)
        walks = [finisher.walk(x, way[-1], noise, calls) for x, (way, calls) in zip(x_s, ways)]
        sample = torch.cat(finisher.pipe.run(walks, prompts, guidance_scale, watch))
        return sample if realism == 1 else blend(self.finish(ends, prompts, 1, 0.0, guidance_scale, watch), sample, realism)

    def dial(self, walk: solvers.Walk, realism: float, noise: schedule.NoiseSchedule, t: int) -> solvers.Walk:
        """`realism.dial` of a walk from timestep t, with what the model's calibration knows of its guesses."""
        return dial(walk, realism, noise, share_of_second_guess(self.config.get("calibration"), float(noise.ratio[t])))

    def importance_of(self, importance: Importance, pictures: list[Picture]) -> list[Tensor | None]:
        """What `compress` was given, as a map [h, w] on each picture's latent, see `importance.maps_of`."""
        maps = maps_of(importance, [picture.x for picture in pictures])
        sizes = [self.latent_shape(*picture.x.shape[1:])[1:] for picture in pictures]
        return [None if own is None else on_latent(self.pad(own[None])[0], size) for own, size in zip(maps, sizes)]

    def run(
        self,
        walks: list[solvers.Walk],
        prompts: list[str],
        guidance_scale: float = 1.0,
        watch: Watch = None,
        extra_channels: Tensor | None = None,
        extra_conditioning: dict[str, Tensor] = {},
    ) -> list:
        """Let the walks of `solvers.run` share the network, each with its prompt."""
        extra = extra_channels, extra_conditioning
        return self.with_network(lambda network: solvers.run(walks, network), prompts, guidance_scale, watch, *extra)

    def with_network(
        self,
        loop: Callable,
        prompts: list[str],
        guidance_scale: float = 1.0,
        watch: Watch = None,
        extra_channels: Tensor | None = None,
        extra_conditioning: dict[str, Tensor] = {},
    ) -> list:
        """loop(network), where network(x_t [B, C, h, w], t [B], i [B]) is the denoiser's output for pictures i, each with its prompt.

        extra_channels: that the denoiser sees of each picture beside x_t, guided or not.
        extra_conditioning: what `predict` gets of each picture, [B, ...], beside its prompt, guided or not.
        """
        conditioning = self.encode_prompt(prompts) | extra_conditioning
        guided = guidance_scale > 1 and any(prompts)
        empty = self.encode_prompt([""] * len(prompts)) | extra_conditioning if guided else None
        step = 0
        with self.labelled_bar("network calls") as bar:

            def network(x_t, timesteps, active):
                nonlocal step

                def of_active(rows):  # an index would be a copy to the device
                    return rows if len(active) == len(prompts) else rows[active]

                seen = x_t if extra_channels is None else torch.cat([x_t, of_active(extra_channels)], 1)
                output = self.predict(seen, timesteps, {name: of_active(rows) for name, rows in conditioning.items()})
                if empty is not None:
                    # Ho & Salimans 2022, classifier-free guidance
                    unguided = self.predict(seen, timesteps, {name: of_active(rows) for name, rows in empty.items()})
                    output = unguided + guidance_scale * (output - unguided)
                check_finite(output, f"the model's output at timestep {max(timesteps)}")
                bar.update()
                if watch is not None:
                    watch(step, max(timesteps), {"latents": x_t, "noise_pred": output})
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

    def decode_in_float64(self, x_0: Tensor) -> Tensor | None:
        """A scaled latent [C, h, w] to a picture [3, H, W], in float64 on the CPU; None if the weights at hand are not those that were saved."""
        vae: Any = getattr(self.vae, "_orig_mod", self.vae)
        if vae is None:
            return x_0.double()
        if vae.dtype not in (torch.float32, torch.float64) or any(tensor.is_meta for tensor in vae.parameters()):
            return None
        with torch.device("meta"):  # a new one: neither hooks nor tiles go along
            copy = type(vae).from_config(vae.config)
        copy.load_state_dict({name: tensor.to("cpu", torch.float64) for name, tensor in vae.state_dict().items()}, assign=True)
        with torch.no_grad():
            return check_finite(
                self.family.decode(copy.eval(), self.family.unscaled(x_0.double()[None]))[0], "the model's output"
            )

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

    @property
    def kind(self) -> str:
        return type(self.family).__name__

    def about(self, header: Header) -> str:
        return f", with latents of {list(self.latent_shape(header.height, header.width))} here"

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
