"""SANA."""

import inspect

from diffusers import SanaPipeline
from diffusers.configuration_utils import FrozenDict

from diffusers_compress.diffusion.families.common import flow_time
from diffusers_compress.diffusion.families.stable_diffusion import StableDiffusion


class Sana(StableDiffusion):
    """SANA and SANA 1.5: flow matching on latents of factor 32 with 32 channels, with Gemma 2.  Xie et al. 2025 (ICLR).

    A prompt stands after an instruction to Gemma, that of diffusers' pipeline; no text has none, as guidance expects it.
    """

    models = "SANA"
    network, network_class = "transformer", "SanaTransformer2DModel"
    parts = ("transformer", "vae", "text_encoder", "tokenizer")
    lora = "SanaLoraLoaderMixin"
    flow = True

    @classmethod
    def matches(cls, config: FrozenDict) -> bool:
        if config.guidance_embeds:  # SANA-Sprint, with a schedule of its own
            return False
        return config.in_channels == config.out_channels and config.patch_size == 1

    @property
    def instruction(self) -> list[str]:
        return inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default

    def encode_prompt(self, prompts):
        return self.text_and_mask(
            SanaPipeline, prompts, lambda prompt: {"complex_human_instruction": self.instruction if prompt else None}
        )

    def predict(self, x_t, timesteps, conditioning):
        transformer = self.pipe.transformer
        return transformer(
            x_t.to(transformer.dtype),
            encoder_hidden_states=conditioning["text"],
            encoder_attention_mask=conditioning["mask"],
            timestep=flow_time(timesteps, x_t.device) * transformer.config.timestep_scale,
            return_dict=False,
        )[0].float()

    def identity(self):
        return super().identity() | {"instruction": self.instruction}
