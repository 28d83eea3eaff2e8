"""HunyuanDiT."""

import torch
from diffusers import HunyuanDiTPipeline
from diffusers.configuration_utils import FrozenDict
from diffusers.models.embeddings import get_2d_rotary_pos_embed
from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import get_resize_crop_region_for_grid

from diffusers_compress.diffusion.families.common import one_by_one
from diffusers_compress.diffusion.families.stable_diffusion import StableDiffusion


class HunyuanDiT(StableDiffusion):
    """HunyuanDiT 1.0 to 1.2: a variance-preserving transformer with two text encoders, CLIP as BERT and mT5, on SDXL's latents.
    Li et al. 2024.

    Its network predicts a variance too (Nichol & Dhariwal 2021), which is dropped: a codec's steps have the posterior's.
    """

    models = "HunyuanDiT"
    network, network_class = "transformer", "HunyuanDiT2DModel"
    parts = ("transformer", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    lora = None
    patch = 2
    TOKENS = {"": 77, "_2": 256}  # of the two text encoders
    BASE_SIZE = 32  # patches along a side of the 512 pixels that positions are scaled to
    ORIGINAL_SIZE = 1024, 1024  # that versions before 1.2 are asked for

    @classmethod
    def matches(cls, config: FrozenDict) -> bool:
        return config.patch_size == 2

    def encode_prompt(self, prompts):
        texts = {name: getattr(self.pipe, name) for name in ("text_encoder_2", "tokenizer_2")}
        own = self.own_pipeline(HunyuanDiTPipeline, **texts, requires_safety_checker=False)
        dtype = self.pipe.transformer.dtype

        def embed(prompt):
            found = {}
            for index, (suffix, length) in enumerate(self.TOKENS.items()):
                options = {"max_sequence_length": length, "text_encoder_index": index}
                text, _, mask, _ = own.encode_prompt(prompt, self.device, dtype, do_classifier_free_guidance=False, **options)
                found |= {f"text{suffix}": text, f"mask{suffix}": mask}
            return found

        return one_by_one(embed, prompts)

    def predict(self, x_t, timesteps, conditioning):
        transformer, device = self.pipe.transformer, x_t.device
        config, (rows, columns) = transformer.config, (side // 2 for side in x_t.shape[-2:])
        region = get_resize_crop_region_for_grid((rows, columns), self.BASE_SIZE)
        positions = get_2d_rotary_pos_embed(config.attention_head_dim, region, (rows, columns), device=device, output_type="pt")
        sizes = [*self.ORIGINAL_SIZE, 16 * rows, 16 * columns, 0, 0]
        output = transformer(
            x_t.to(transformer.dtype),
            torch.tensor(timesteps, device=device, dtype=transformer.dtype),
            encoder_hidden_states=conditioning["text"],
            text_embedding_mask=conditioning["mask"],
            encoder_hidden_states_t5=conditioning["text_2"],
            text_embedding_mask_t5=conditioning["mask_2"],
            image_meta_size=torch.tensor([sizes], device=device, dtype=transformer.dtype).repeat(len(x_t), 1),
            style=torch.zeros(len(x_t), device=device, dtype=torch.int64),
            image_rotary_emb=positions,
            return_dict=False,
        )[0]
        return output[:, : self.channels].float()
