"""FLUX.2."""

import torch
import torch.nn.functional as F
from diffusers import Flux2KleinPipeline, Flux2Pipeline
from diffusers.configuration_utils import FrozenDict

from diffusers_compress.diffusion.families.common import flow_time, one_by_one, pack, unpack
from diffusers_compress.diffusion.families.stable_diffusion import StableDiffusion
from diffusers_compress.weights import stored


class Flux2(StableDiffusion):
    """FLUX.2 dev and klein: a flow-matching transformer on packed latents, with Mistral 3 or Qwen3.

    Where guidance was distilled into the network, its strength is 1: no guidance, so that x_0_hat is the mean that coding needs.
    Latents are scaled by the running moments of a batch norm over 2x2 pixels.
    """

    models = "FLUX.2"
    network, network_class = "transformer", "Flux2Transformer2DModel"
    parts = ("transformer", "vae", "text_encoder", "tokenizer")
    lora = "Flux2LoraLoaderMixin"
    flow = True
    patch = 2

    @classmethod
    def matches(cls, config: FrozenDict) -> bool:
        return config.out_channels in (None, config.in_channels)

    def encode_prompt(self, prompts):
        is_klein = self.pipe.text_encoder.config.model_type.startswith("qwen")
        own = self.own_pipeline(Flux2KleinPipeline if is_klein else Flux2Pipeline)
        dtype = self.pipe.transformer.dtype
        return one_by_one(lambda prompt: {"text": own.encode_prompt(prompt, self.device)[0].to(dtype)}, prompts)

    def predict(self, x_t, timesteps, conditioning):
        transformer, (height, width) = self.pipe.transformer, x_t.shape[-2:]

        def positions(*sizes):  # of picture, row, column, word
            return torch.cartesian_prod(*map(torch.arange, sizes)).to(x_t.device)

        output = transformer(
            hidden_states=pack(x_t.to(transformer.dtype)),
            timestep=flow_time(timesteps, x_t.device) / self.pipe.scheduler.config.num_train_timesteps,
            guidance=torch.ones(len(x_t), dtype=torch.float32, device=x_t.device) if transformer.config.guidance_embeds else None,
            encoder_hidden_states=conditioning["text"],
            txt_ids=positions(1, 1, 1, conditioning["text"].shape[1]),
            img_ids=positions(1, height // 2, width // 2, 1),
            return_dict=False,
        )[0]
        return unpack(output, height, width).float()

    def scaled(self, z):
        mean, std = self.moments(z)
        return F.pixel_shuffle((F.pixel_unshuffle(z, 2) - mean) / std, 2)

    def unscaled(self, x_0):
        mean, std = self.moments(x_0)
        return F.pixel_shuffle(F.pixel_unshuffle(x_0, 2) * std + mean, 2)

    def moments(self, like):
        state = stored(self.pipe.vae)  # offloading leaves none in the layer itself, which is not called
        mean, variance = (state[f"bn.running_{name}"].to(like)[:, None, None] for name in ("mean", "var"))
        return mean, (variance + self.pipe.vae.config.batch_norm_eps).sqrt()

    def identity(self):
        return {"batch_norm_eps": self.pipe.vae.config.batch_norm_eps}
