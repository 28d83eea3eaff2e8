"""Lumina-Image 2.0."""

from diffusers import Lumina2Pipeline
from diffusers.configuration_utils import FrozenDict

from diffusers_compress.diffusion.families.common import flow_time
from diffusers_compress.diffusion.families.stable_diffusion import StableDiffusion


class Lumina2(StableDiffusion):
    """Lumina-Image 2.0: a flow-matching transformer with Gemma 2, on FLUX.1's latents.  Qin et al. 2025.

    Its time runs from noise at 0 to the picture at 1, and its output is x_0 - eps.
    """

    models = "Lumina-Image 2"
    network, network_class = "transformer", "Lumina2Transformer2DModel"
    parts = ("transformer", "vae", "text_encoder", "tokenizer")
    lora = "Lumina2LoraLoaderMixin"
    flow = True
    patch = 2

    @classmethod
    def matches(cls, config: FrozenDict) -> bool:
        return config.out_channels in (None, config.in_channels) and config.patch_size == 2

    def encode_prompt(self, prompts):
        return self.text_and_mask(Lumina2Pipeline, prompts)

    def predict(self, x_t, timesteps, conditioning):
        transformer = self.pipe.transformer
        return -transformer(
            hidden_states=x_t.to(transformer.dtype),
            timestep=1 - flow_time(timesteps, x_t.device) / self.pipe.scheduler.config.num_train_timesteps,
            encoder_hidden_states=conditioning["text"],
            encoder_attention_mask=conditioning["mask"],
            return_dict=False,
        )[0].float()
