"""Kolors."""

from diffusers.configuration_utils import FrozenDict

from diffusers_compress.diffusion.families.common import one_by_one
from diffusers_compress.diffusion.families.stable_diffusion_xl import StableDiffusionXL


class Kolors(StableDiffusionXL):
    """Kolors: SDXL's UNet and latents with ChatGLM3 as its text encoder.  Kolors Team 2024.

    Its tokenizer needs the package sentencepiece.
    """

    models = "Kolors"
    parts = ("unet", "vae", "text_encoder", "tokenizer")
    lora = "StableDiffusionLoraLoaderMixin"

    @classmethod
    def matches(cls, config: FrozenDict) -> bool:
        own_text = config.encoder_hid_dim_type == "text_proj"
        return own_text and config.addition_embed_type == "text_time" and config.in_channels == config.out_channels

    def text_and_summary(self, prompts):
        from diffusers import KolorsPipeline  # which warns of a deprecation when it is imported

        own = self.own_pipeline(KolorsPipeline)

        def embed(prompt):
            text, _, summary, _ = own.encode_prompt(prompt, self.device, do_classifier_free_guidance=False)
            return {"text": text, "summary": summary}

        found = one_by_one(embed, prompts)
        return found["text"], found["summary"]
