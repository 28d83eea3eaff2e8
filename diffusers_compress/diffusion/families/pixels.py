"""Unconditional models in pixel space."""

import torch
from diffusers.configuration_utils import FrozenDict

from diffusers_compress.diffusion.families.stable_diffusion import StableDiffusion


class Pixels(StableDiffusion):
    """An unconditional UNet on pixels, as in `DDPMPipeline` folders: the picture is its own latent."""

    models = "unconditional RGB models in pixel space"
    network_class = "UNet2DModel"
    parts = ("unet",)
    lora = None

    def __init__(self, pipe):
        super().__init__(pipe)
        if getattr(pipe, "vae", None) is not None:
            raise ValueError("an unconditional model on the latents of an autoencoder is not supported; those in pixel space are")

    @classmethod
    def matches(cls, config: FrozenDict) -> bool:
        return config.in_channels == 3 and config.class_embed_type is None

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

    def predict(self, x_t, timesteps, conditioning):
        t = torch.tensor(timesteps, device=x_t.device)
        output = self.pipe.unet(x_t.to(self.pipe.unet.dtype), t, return_dict=False)[0].float()
        return output[:, : self.channels]  # some networks predict a variance too: Nichol & Dhariwal 2021

    def encode_picture(self, x):
        return x.to(self.device, torch.float32)

    def decode_latent(self, x_0):
        return x_0.float()

    def identity(self):
        return {}
