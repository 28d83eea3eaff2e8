"""FLUX.1."""

import torch
from diffusers.configuration_utils import FrozenDict

from diffusers_compress.diffusion.families.common import flow_time, pack, unpack
from diffusers_compress.diffusion.families.stable_diffusion import StableDiffusion


class Flux(StableDiffusion):
    """FLUX.1 dev and schnell: a flow-matching transformer on packed latents, CLIP for the summary, T5 for the text.

    Where guidance was distilled into the network, its strength is 1: no guidance, so that x_0_hat is the mean that coding needs.
    """

    models = "FLUX.1"
    network, network_class = "transformer", "FluxTransformer2DModel"
    parts = ("transformer", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    lora = "FluxLoraLoaderMixin"
    flow = True
    patch = 2
    T5_TOKENS = 512

    @classmethod
    def matches(cls, config: FrozenDict) -> bool:
        return config.out_channels in (None, config.in_channels)

    def encode_prompt(self, prompts):
        summary = self.pipe.text_encoder(self.tokens("tokenizer", prompts)).pooler_output
        text = self.pipe.text_encoder_2(self.tokens("tokenizer_2", prompts, self.T5_TOKENS))[0]
        return {"text": text.to(self.pipe.transformer.dtype), "summary": summary.to(self.pipe.transformer.dtype)}

    def predict(self, x_t, timesteps, conditioning):
        transformer, (height, width) = self.pipe.transformer, x_t.shape[-2:]
        rows, columns = height // 2, width // 2
        where = torch.zeros(rows, columns, 3, dtype=torch.float32, device=x_t.device)
        where[..., 1], where[..., 2] = torch.arange(rows)[:, None], torch.arange(columns)
        output = transformer(
            hidden_states=pack(x_t.to(transformer.dtype)),
            timestep=flow_time(timesteps, x_t.device) / self.pipe.scheduler.config.num_train_timesteps,
            guidance=torch.ones(len(x_t), dtype=torch.float32, device=x_t.device) if transformer.config.guidance_embeds else None,
            encoder_hidden_states=conditioning["text"],
            pooled_projections=conditioning["summary"],
            txt_ids=torch.zeros(conditioning["text"].shape[1], 3, dtype=torch.float32, device=x_t.device),
            img_ids=where.flatten(0, 1),
            return_dict=False,
        )[0]
        return unpack(output, height, width).float()
