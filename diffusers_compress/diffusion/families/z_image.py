"""Z-Image."""

import torch
from diffusers import ZImagePipeline
from diffusers.configuration_utils import FrozenDict

from diffusers_compress.diffusion.families.common import by_length, flow_time, padded
from diffusers_compress.diffusion.families.stable_diffusion import StableDiffusion


class ZImage(StableDiffusion):
    """Z-Image and Z-Image-Turbo: a flow-matching transformer with Qwen3, on FLUX.1's latents.  Cai et al. 2025.

    Its time runs from noise at 0 to the picture at 1, and its output is x_0 - eps.
    """

    models = "Z-Image"
    network, network_class = "transformer", "ZImageTransformer2DModel"
    parts = ("transformer", "vae", "text_encoder", "tokenizer")
    lora = "ZImageLoraLoaderMixin"
    flow = True
    patch = 2

    @classmethod
    def matches(cls, config: FrozenDict) -> bool:
        return config.siglip_feat_dim is None and 2 in config.all_patch_size

    def encode_prompt(self, prompts):
        own = self.own_pipeline(ZImagePipeline)
        texts = [own.encode_prompt(prompt, self.device, False)[0][0] for prompt in prompts]
        return padded([text.to(self.pipe.transformer.dtype) for text in texts])

    def predict(self, x_t, timesteps, conditioning):
        transformer = self.pipe.transformer

        def predict(x_t, timesteps, text):
            frames = list(x_t.to(transformer.dtype)[:, :, None].unbind())  # one each
            time = 1 - flow_time(timesteps, x_t.device) / self.pipe.scheduler.config.num_train_timesteps
            output = transformer(frames, time, list(text.unbind()), return_dict=False)[0]
            return -torch.stack(output)[:, :, 0].float()

        return by_length(predict, x_t, timesteps, conditioning)
