"""PixArt-Sigma."""

import torch
from diffusers import PixArtSigmaPipeline
from diffusers.configuration_utils import FrozenDict

from diffusers_compress.diffusion.families.stable_diffusion import StableDiffusion


class PixArt(StableDiffusion):
    """PixArt-Sigma: a variance-preserving transformer with T5, on SDXL's latents.  Chen et al. 2024.

    Its network predicts a variance too (Nichol & Dhariwal 2021), which is dropped: a codec's steps have the posterior's.
    """

    models = "PixArt-Sigma"
    network, network_class = "transformer", "PixArtTransformer2DModel"
    parts = ("transformer", "vae", "text_encoder", "tokenizer")
    lora = None
    patch = 2

    @classmethod
    def matches(cls, config: FrozenDict) -> bool:
        if config.patch_size != 2:
            return False
        sizes = config.use_additional_conditions
        return not (config.sample_size == 128 if sizes is None else sizes)  # PixArt-alpha at 1024 pixels asks for sizes

    def encode_prompt(self, prompts):
        return self.text_and_mask(PixArtSigmaPipeline, prompts)

    def predict(self, x_t, timesteps, conditioning):
        transformer = self.pipe.transformer
        output = transformer(
            x_t.to(transformer.dtype),
            encoder_hidden_states=conditioning["text"],
            encoder_attention_mask=conditioning["mask"],
            timestep=torch.tensor(timesteps, device=x_t.device),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            return_dict=False,
        )[0]
        return output[:, : self.channels].float()
