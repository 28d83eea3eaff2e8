"""What differs between families of diffusion models: a small class for each, found from a pipeline's components.

A family is a denoiser with its latents: pictures to x_0 and back, what the network is told of a prompt, and its output for x_t at
timestep t, which `schedule` and `diffusion` turn into x_0_hat. All else is the same for all of them. A new family is one class more.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import FrozenDict
from torch import Tensor


class StableDiffusion:
    """Stable Diffusion 1.x, 2.x and Turbo: a UNet with one text encoder, on the latents of an autoencoder.

    `pipe` is a diffusers pipeline; its components have the names that diffusers' own pipeline of the family gives them.
    """

    network = "unet"
    parts = ("unet", "vae", "text_encoder", "tokenizer")
    optional = ()
    flow = False  # matching, or variance-preserving
    patch = 1  # sides of a latent are multiples of it

    def __init__(self, pipe: DiffusionPipeline):
        self.pipe = pipe

    @staticmethod
    def matches(pipe: DiffusionPipeline) -> bool:
        config = config_of(pipe, "unet", "UNet2DConditionModel")
        return config is not None and config.addition_embed_type is None and config.in_channels == config.out_channels

    @property
    def channels(self) -> int:
        return self.pipe.vae.config.latent_channels

    def encode_prompt(self, prompts: list[str]) -> dict[str, Tensor]:
        """What `predict` needs of B prompts: tensors [B, ...]."""
        ids = self.tokens("tokenizer", prompts)
        return {"text": self.pipe.text_encoder(ids)[0].to(self.pipe.unet.dtype)}

    def predict(self, x_t: Tensor, timesteps: list[int], told: dict[str, Tensor]) -> Tensor:
        """The network's output [B, C, h, w] in float32 for x_t [B, C, h, w] at one timestep each."""
        t = torch.tensor(timesteps, device=x_t.device)
        return self.pipe.unet(x_t.to(self.pipe.unet.dtype), t, told["text"], return_dict=False)[0].float()

    def encode_picture(self, x: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [-1, 1] to scaled latents [B, C, H/8, W/8] in float32: the mean, not a draw."""
        vae = self.pipe.vae
        encoded = vae.encode(x.to(self.pipe._execution_device, vae.dtype))
        mean = (encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents).float()
        return (mean - (vae.config.shift_factor or 0)) * vae.config.scaling_factor

    def decode_latent(self, x_0: Tensor) -> Tensor:
        """Scaled latents [B, C, h, w] to pictures [B, 3, 8h, 8w] in float32, about [-1, 1]."""
        vae = self.pipe.vae
        z = x_0 / vae.config.scaling_factor + (vae.config.shift_factor or 0)
        return vae.decode(z.to(vae.dtype), return_dict=False)[0].float()

    def identity(self) -> dict:
        """Plain values that decide what a file decodes to, besides weights and noise levels."""
        return {"scaling_factor": self.pipe.vae.config.scaling_factor, "shift_factor": self.pipe.vae.config.shift_factor}

    def tokens(self, tokenizer: str, prompts: list[str], length: int | None = None) -> Tensor:
        """Token ids [B, length] of a tokenizer; by default as many as its model takes."""
        tokenizer = getattr(self.pipe, tokenizer)
        length = length or tokenizer.model_max_length
        ids = tokenizer(prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt").input_ids
        return ids.to(self.pipe._execution_device)


class StableDiffusionXL(StableDiffusion):
    """SDXL: two text encoders, and a UNet that is told a summary of the text and the picture's size.  Podell et al. 2023."""

    parts = ("unet", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")

    @staticmethod
    def matches(pipe: DiffusionPipeline) -> bool:
        config = config_of(pipe, "unet", "UNet2DConditionModel")
        return config is not None and config.addition_embed_type == "text_time" and config.in_channels == config.out_channels

    def encode_prompt(self, prompts):
        text, summary = self.two_clips(prompts)
        if self.zeros_for_empty:  # as in training
            given = torch.tensor([bool(prompt) for prompt in prompts], device=text.device)
            text, summary = text * given[:, None, None], summary * given[:, None]
        return {"text": text.to(self.pipe.unet.dtype), "summary": summary.to(self.pipe.unet.dtype)}

    @property
    def zeros_for_empty(self) -> bool:
        return self.pipe.config.force_zeros_for_empty_prompt is not False

    def two_clips(self, prompts):
        """Last but one layer of both text encoders [B, tokens, dim + dim_2], and the summary of the second [B, dim]."""
        first, second = (
            getattr(self.pipe, encoder)(self.tokens(tokenizer, prompts), output_hidden_states=True)
            for encoder, tokenizer in (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2"))
        )
        return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1), second[0]

    def predict(self, x_t, timesteps, told):
        height, width = (self.pipe.vae_scale_factor * side for side in x_t.shape[-2:])
        # original size, top left corner, target size: Podell et al. 2023, section 2.2
        size = torch.tensor([[height, width, 0, 0, height, width]], device=x_t.device).expand(len(x_t), -1)
        added = {"text_embeds": told["summary"], "time_ids": size}
        t = torch.tensor(timesteps, device=x_t.device)
        x_t, unet = x_t.to(self.pipe.unet.dtype), self.pipe.unet
        return unet(x_t, t, told["text"], added_cond_kwargs=added, return_dict=False)[0].float()

    def encode_picture(self, x):
        with in_float32(self.pipe.vae):
            return super().encode_picture(x)

    def decode_latent(self, x_0):
        with in_float32(self.pipe.vae):
            return super().decode_latent(x_0)

    def identity(self):
        return super().identity() | {"force_zeros_for_empty_prompt": self.zeros_for_empty}


class StableDiffusion3(StableDiffusion):
    """Stable Diffusion 3 and 3.5: a flow-matching transformer, two CLIP text encoders and perhaps T5.  Esser et al. 2024."""

    network = "transformer"
    parts = ("transformer", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    optional = ("text_encoder_3",)
    flow = True
    patch = 2
    T5_TOKENS = 256

    @staticmethod
    def matches(pipe: DiffusionPipeline) -> bool:
        config = config_of(pipe, "transformer", "SD3Transformer2DModel")
        return config is not None and config.in_channels == config.out_channels and config.patch_size == 2

    def encode_prompt(self, prompts):
        ids, dtype = self.tokens("tokenizer", prompts), self.pipe.transformer.dtype
        first = self.pipe.text_encoder(ids, output_hidden_states=True)
        second = self.pipe.text_encoder_2(self.tokens("tokenizer_2", prompts), output_hidden_states=True)
        clip = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1)
        if self.pipe.text_encoder_3 is None:
            t5 = clip.new_zeros(len(prompts), self.T5_TOKENS, self.pipe.transformer.config.joint_attention_dim)
        else:
            t5 = self.pipe.text_encoder_3(self.tokens("tokenizer_3", prompts, self.T5_TOKENS))[0]
        clip = F.pad(clip, (0, t5.shape[-1] - clip.shape[-1]))
        return {"text": torch.cat([clip.to(dtype), t5.to(dtype)], -2), "summary": torch.cat([first[0], second[0]], -1).to(dtype)}

    def predict(self, x_t, timesteps, told):
        transformer = self.pipe.transformer
        return transformer(
            hidden_states=x_t.to(transformer.dtype),
            timestep=flow_time(timesteps, x_t.device),
            encoder_hidden_states=told["text"],
            pooled_projections=told["summary"],
            return_dict=False,
        )[0].float()


class Flux(StableDiffusion):
    """FLUX.1 dev and schnell: a flow-matching transformer on packed latents, CLIP for the summary, T5 for the text.

    Where guidance was distilled into the network, it is told 1: no guidance, so that x_0_hat is the mean that coding needs.
    """

    network = "transformer"
    parts = ("transformer", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    flow = True
    patch = 2
    T5_TOKENS = 512

    @staticmethod
    def matches(pipe: DiffusionPipeline) -> bool:
        config = config_of(pipe, "transformer", "FluxTransformer2DModel")
        return config is not None and config.out_channels in (None, config.in_channels)

    def encode_prompt(self, prompts):
        summary = self.pipe.text_encoder(self.tokens("tokenizer", prompts)).pooler_output
        text = self.pipe.text_encoder_2(self.tokens("tokenizer_2", prompts, self.T5_TOKENS))[0]
        return {"text": text.to(self.pipe.transformer.dtype), "summary": summary.to(self.pipe.transformer.dtype)}

    def predict(self, x_t, timesteps, told):
        transformer, (rows, columns) = self.pipe.transformer, (side // 2 for side in x_t.shape[-2:])
        packed = F.pixel_unshuffle(x_t.to(transformer.dtype), 2).flatten(2).mT
        where = torch.zeros(rows, columns, 3, device=x_t.device)
        where[..., 1], where[..., 2] = torch.arange(rows)[:, None], torch.arange(columns)
        output = transformer(
            hidden_states=packed,
            timestep=flow_time(timesteps, x_t.device) / self.pipe.scheduler.config.num_train_timesteps,
            guidance=torch.ones(len(x_t), device=x_t.device) if transformer.config.guidance_embeds else None,
            encoder_hidden_states=told["text"],
            pooled_projections=told["summary"],
            txt_ids=torch.zeros(told["text"].shape[1], 3, device=x_t.device),
            img_ids=where.flatten(0, 1),
            return_dict=False,
        )[0]
        return F.pixel_shuffle(output.mT.unflatten(-1, (rows, columns)), 2).float()


class Pixels(StableDiffusion):
    """An unconditional UNet on pixels, as in `DDPMPipeline` folders: the picture is its own latent."""

    parts = ("unet",)

    @staticmethod
    def matches(pipe: DiffusionPipeline) -> bool:
        config = config_of(pipe, "unet", "UNet2DModel")
        return (
            config is not None
            and config.in_channels == 3
            and config.class_embed_type is None
            and getattr(pipe, "vae", None) is None
        )

    @property
    def patch(self):
        return 2 ** (len(self.pipe.unet.config.block_out_channels) - 1)

    @property
    def channels(self):
        return self.pipe.unet.config.in_channels

    def encode_prompt(self, prompts):
        if any(prompts):
            raise ValueError(f"the model is unconditional and takes no prompt, not {next(filter(None, prompts))!r}")
        return {}

    def predict(self, x_t, timesteps, told):
        t = torch.tensor(timesteps, device=x_t.device)
        output = self.pipe.unet(x_t.to(self.pipe.unet.dtype), t, return_dict=False)[0].float()
        return output[:, : self.channels]  # some networks predict a variance too: Nichol & Dhariwal 2021

    def encode_picture(self, x):
        return x.to(self.pipe._execution_device, torch.float32)

    def decode_latent(self, x_0):
        return x_0.float()

    def identity(self):
        return {}


FAMILIES = (StableDiffusion, StableDiffusionXL, StableDiffusion3, Flux, Pixels)


def family_of(pipe: DiffusionPipeline) -> StableDiffusion:
    """The family that a pipeline's components belong to. ValueError if it is none of these, or components are missing."""
    family = next((family for family in FAMILIES if family.matches(pipe)), None)
    if family is None:
        networks = (getattr(pipe, name, None) for name in ("unet", "transformer"))
        found = ", ".join(type(network).__name__ for network in networks if network is not None) or "no network"
        raise ValueError(
            f"no family is known that has these components ({found}); supported are Stable Diffusion 1.x and 2.x, SDXL, Stable "
            "Diffusion 3, FLUX.1 and unconditional RGB models in pixel space, neither inpainting models nor refiners nor others with more "
            "inputs"
        )
    missing = [name for name in family.parts if getattr(pipe, name, None) is None]
    if missing:
        raise ValueError(
            f"a {family.__name__} model needs the components {', '.join(family.parts)}; missing: {', '.join(missing)}"
        )
    return family(pipe)


def config_of(pipe: DiffusionPipeline, component: str, class_name: str) -> FrozenDict | None:
    """The config of a component of this class, compiled or not; None if there is no such."""
    module = getattr(pipe, component, None)
    module = getattr(module, "_orig_mod", module)
    return module.config if type(module).__name__ == class_name else None


def flow_time(timesteps: list[int], device: torch.device) -> Tensor:
    """What flow-matching networks are told of level t: sigma_t T = t + 1."""
    return torch.tensor(timesteps, device=device, dtype=torch.float32) + 1


@contextmanager
def in_float32(vae: ModelMixin) -> Iterator[None]:
    """For the block, an autoencoder that overflows in float16 (SDXL's, by its config) is in float32."""
    widen = vae.dtype == torch.float16 and vae.config.force_upcast
    if widen:
        vae.to(torch.float32)
    try:
        yield
    finally:
        if widen:
            vae.to(torch.float16)
