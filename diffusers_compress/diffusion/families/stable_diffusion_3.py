"""Stable Diffusion 3 and 3.5."""

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import FrozenDict

from diffusers_compress.diffusion.families.common import flow_time
from diffusers_compress.diffusion.families.stable_diffusion import StableDiffusion


class StableDiffusion3(StableDiffusion):
    """Stable Diffusion 3 and 3.5: a flow-matching transformer, two CLIP text encoders and perhaps T5.  Esser et al. 2024."""

    models = "Stable Diffusion 3"
    network, network_class = "transformer", "SD3Transformer2DModel"
    parts = ("transformer", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    lora = "SD3LoraLoaderMixin"
    optional = ("text_encoder_3",)
    flow = True
    patch = 2
    T5_TOKENS = 256

    @classmethod
    def matches(cls, config: FrozenDict) -> bool:
        return config.in_channels == config.out_channels and config.patch_size == 2

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

    def predict(self, x_t, timesteps, conditioning):
        transformer = self.pipe.transformer
        return transformer(
            hidden_states=x_t.to(transformer.dtype),
            timestep=flow_time(timesteps, x_t.device),
            encoder_hidden_states=conditioning["text"],
            pooled_projections=conditioning["summary"],
            return_dict=False,
        )[0].float()
