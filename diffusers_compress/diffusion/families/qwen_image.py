"""Qwen-Image."""

import torch
from diffusers import QwenImagePipeline
from diffusers.configuration_utils import FrozenDict

from diffusers_compress.diffusion.families.common import by_length, flow_time, mean_of, pack, padded, unpack
from diffusers_compress.diffusion.families.stable_diffusion import StableDiffusion


class QwenImage(StableDiffusion):
    """Qwen-Image: a flow-matching transformer on packed latents, with Qwen2.5-VL.  Wu et al. 2025.

    Its autoencoder is one for video, causal in time; a picture is a video of one frame. Each channel of a latent has its own scale.
    """

    models = "Qwen-Image"
    network, network_class = "transformer", "QwenImageTransformer2DModel"
    parts = ("transformer", "vae", "text_encoder", "tokenizer")
    lora = "QwenImageLoraLoaderMixin"
    flow = True
    patch = 2

    @classmethod
    def matches(cls, config: FrozenDict) -> bool:
        more = config.guidance_embeds or config.use_additional_t_cond or config.use_layer3d_rope
        return config.in_channels == 4 * (config.out_channels or 0) and not more

    @property
    def channels(self):
        return self.pipe.vae.config.z_dim

    def encode_prompt(self, prompts):
        own = self.own_pipeline(QwenImagePipeline)
        texts = [own.encode_prompt(prompt, self.device)[0][0] for prompt in prompts]
        return padded([text.to(self.pipe.transformer.dtype) for text in texts])

    def predict(self, x_t, timesteps, conditioning):
        transformer, (height, width) = self.pipe.transformer, x_t.shape[-2:]

        def predict(x_t, timesteps, text):
            tokens = transformer(
                hidden_states=pack(x_t.to(transformer.dtype)),
                timestep=flow_time(timesteps, x_t.device) / self.pipe.scheduler.config.num_train_timesteps,
                encoder_hidden_states=text,
                img_shapes=[[(1, height // 2, width // 2)]] * len(x_t),
                return_dict=False,
            )[0]
            return unpack(tokens, height, width).float()

        return by_length(predict, x_t, timesteps, conditioning)

    def encode(self, vae, x):
        return mean_of(vae.encode(x[:, :, None]))[:, :, 0]

    def decode(self, vae, z):
        return vae.decode(z[:, :, None], return_dict=False)[0][:, :, 0]

    def scaled(self, z):
        mean, std = self.moments(z)
        return (z - mean) / std

    def unscaled(self, x_0):
        mean, std = self.moments(x_0)
        return x_0 * std + mean

    def moments(self, like):
        config = self.pipe.vae.config
        return (torch.tensor(values).to(like)[:, None, None] for values in (config.latents_mean, config.latents_std))

    def identity(self):
        config = self.pipe.vae.config
        return {"latents_mean": list(config.latents_mean), "latents_std": list(config.latents_std)}
