"""Stable Diffusion 1.x, 2.x and Turbo, the base of all families."""

import inspect
from collections.abc import Callable

import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import FrozenDict
from diffusers.loaders import TextualInversionLoaderMixin
from torch import Tensor

from diffusers_compress.diffusion.families.common import mean_of, one_by_one


class StableDiffusion:
    """Stable Diffusion 1.x, 2.x and Turbo: a UNet with one text encoder, on the latents of an autoencoder.

    `pipe` is a diffusers pipeline; its components have the names that diffusers' own pipeline of the family gives them.
    """

    models = "Stable Diffusion 1.x and 2.x"  # as a user calls them
    network, network_class = "unet", "UNet2DConditionModel"
    parts: tuple[str, ...] = ("unet", "vae", "text_encoder", "tokenizer")
    optional: tuple[str, ...] = ()
    lora: str | None = "StableDiffusionLoraLoaderMixin"  # of diffusers.loaders: reads files of LoRA weights
    flow = False  # matching, or variance-preserving
    patch = 1  # sides of a latent are multiples of it

    def __init__(self, pipe: DiffusionPipeline):
        self.pipe = pipe

    @classmethod
    def matches(cls, config: FrozenDict) -> bool:
        """Whether a network of `network_class` with this config is of the family: it takes what `predict` gives it, and nothing else."""
        return config.addition_embed_type is None and config.in_channels == config.out_channels

    @property
    def channels(self) -> int:
        return self.pipe.vae.config.latent_channels

    def encode_prompt(self, prompts: list[str]) -> dict[str, Tensor]:
        """What `predict` needs of B prompts: tensors [B, ...]."""
        ids = self.tokens("tokenizer", prompts)
        return {"text": self.pipe.text_encoder(ids)[0].to(self.pipe.unet.dtype)}

    def predict(self, x_t: Tensor, timesteps: list[int], conditioning: dict[str, Tensor]) -> Tensor:
        """The network's output [B, C, h, w] in float32 for x_t [B, C, h, w] at one timestep each."""
        t, unet = torch.tensor(timesteps, device=x_t.device), self.pipe.unet
        x_t = x_t.to(getattr(unet, "input_dtype", None) or unet.dtype)  # a `dtype` looks at all layers
        return unet(x_t, t, conditioning["text"], return_dict=False)[0].float()

    def encode_picture(self, x: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [-1, 1] to scaled latents [B, C, H/8, W/8] in float32: the mean, not a draw."""
        vae = self.pipe.vae
        return self.scaled(self.encode(vae, x.to(self.device, vae.dtype)).float())

    def decode_latent(self, x_0: Tensor) -> Tensor:
        """Scaled latents [B, C, h, w] to pictures [B, 3, 8h, 8w] in float32, about [-1, 1]."""
        vae = self.pipe.vae
        return self.decode(vae, self.unscaled(x_0).to(vae.dtype)).float()

    def encode(self, vae: ModelMixin, x: Tensor) -> Tensor:
        """The mean latent, as the autoencoder has it."""
        return mean_of(vae.encode(x))

    def decode(self, vae: ModelMixin, z: Tensor) -> Tensor:
        return vae.decode(z, return_dict=False)[0]

    def scaled(self, z: Tensor) -> Tensor:
        """The autoencoder's latents to those of about unit variance that the network knows."""
        config = self.pipe.vae.config
        return (z - (config.get("shift_factor") or 0)) * config.scaling_factor

    def unscaled(self, x_0: Tensor) -> Tensor:
        """`scaled` undone."""
        config = self.pipe.vae.config
        return x_0 / config.scaling_factor + (config.get("shift_factor") or 0)

    def identity(self) -> dict:
        """Plain values that decide what a file decodes to, besides weights and noise levels."""
        config = self.pipe.vae.config
        return {"scaling_factor": config.scaling_factor, "shift_factor": config.get("shift_factor")}

    @property
    def device(self) -> torch.device:
        return self.pipe._execution_device

    def own_pipeline(self, kind: type[DiffusionPipeline], **options) -> DiffusionPipeline:
        """diffusers' own pipeline of the family, without a network: what it makes of a prompt is what the network was trained on."""
        needed = [name for name, own in inspect.signature(kind).parameters.items() if own.default is own.empty]
        texts = {"text_encoder": self.pipe.text_encoder, "tokenizer": self.pipe.tokenizer}
        return kind(**dict.fromkeys(needed) | texts | options)

    def text_and_mask(
        self, kind: type[DiffusionPipeline], prompts: list[str], options: Callable[[str], dict] = lambda prompt: {}
    ) -> dict[str, Tensor]:
        """What the own pipeline makes of prompts: text [B, L, dim], and mask [B, L], 1 where there is any. options: of its
        `encode_prompt`, by the prompt."""
        own, dtype = self.own_pipeline(kind), getattr(self.pipe, self.network).dtype

        def embed(prompt):
            text, mask, *_ = own.encode_prompt(prompt, False, device=self.device, **options(prompt))
            return {"text": text.to(dtype), "mask": mask}

        return one_by_one(embed, prompts)

    def tokens(self, name: str, prompts: list[str], length: int | None = None) -> Tensor:
        """Token ids [B, length] of the tokenizer of this name; by default as many as its model takes."""
        tokenizer = getattr(self.pipe, name)
        length = length or tokenizer.model_max_length
        prompts = TextualInversionLoaderMixin().maybe_convert_prompt(prompts, tokenizer)  # a word may stand for several vectors
        ids = tokenizer(prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt").input_ids
        return ids.to(self.device)
