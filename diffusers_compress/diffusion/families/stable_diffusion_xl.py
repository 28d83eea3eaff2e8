"""SDXL."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import ModelMixin
from diffusers.configuration_utils import FrozenDict

from diffusers_compress.diffusion.families.stable_diffusion import StableDiffusion


class StableDiffusionXL(StableDiffusion):
    """SDXL: two text encoders, and a UNet that is conditioned on a summary of the text and on the picture's size.  Podell et al. 2023."""

    models = "SDXL"
    parts: tuple[str, ...] = ("unet", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    lora = "StableDiffusionXLLoraLoaderMixin"

    @classmethod
    def matches(cls, config: FrozenDict) -> bool:
        own_text = config.encoder_hid_dim_type != "text_proj"  # unlike Kolors'
        return own_text and config.addition_embed_type == "text_time" and config.in_channels == config.out_channels

    def encode_prompt(self, prompts):
        text, summary = self.text_and_summary(prompts)
        if self.zeros_for_empty:  # as in training
            given = torch.tensor([bool(prompt) for prompt in prompts], device=text.device)
            text, summary = text * given[:, None, None], summary * given[:, None]
        return {"text": text.to(self.pipe.unet.dtype), "summary": summary.to(self.pipe.unet.dtype)}

    @property
    def zeros_for_empty(self) -> bool:
        return self.pipe.config.force_zeros_for_empty_prompt is not False

    def text_and_summary(self, prompts):
        """Last but one layer of both text encoders [B, tokens, dim + dim_2], and the summary of the second [B, dim]."""
        first, second = (
            getattr(self.pipe, encoder)(self.tokens(tokenizer, prompts), output_hidden_states=True)
            for encoder, tokenizer in (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2"))
        )
        return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1), second[0]

    def predict(self, x_t, timesteps, conditioning):
        height, width = (self.pipe.vae_scale_factor * side for side in x_t.shape[-2:])
        # original size, top left corner, target size: Podell et al. 2023, section 2.2
        size = torch.tensor([[height, width, 0, 0, height, width]], device=x_t.device).expand(len(x_t), -1)
        added = {"text_embeds": conditioning["summary"], "time_ids": size}
        t = torch.tensor(timesteps, device=x_t.device)
        x_t, unet = x_t.to(self.pipe.unet.dtype), self.pipe.unet
        return unet(x_t, t, conditioning["text"], added_cond_kwargs=added, return_dict=False)[0].float()

    def encode_picture(self, x):
        with in_float32(self.pipe.vae):
            return super().encode_picture(x)

    def decode_latent(self, x_0):
        with in_float32(self.pipe.vae):
            return super().decode_latent(x_0)

    def identity(self):
        return super().identity() | {"force_zeros_for_empty_prompt": self.zeros_for_empty}


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
