"""What a model keeps in memory at most while DiffC codes a picture with it, counted without a GPU and without its weights.

    python benchmarks/memory.py                                   # all families, 1024x1024, bfloat16: the table of docs/families.md
    python benchmarks/memory.py "Stable Diffusion 1.5" --size 512 512 --dtype float16
    python benchmarks/memory.py "Stable Diffusion 1.5" --size 2048 2048 --dtype float16 --tiling

Every tensor counts from the operation that makes it until it is freed. Text encoders, network and autoencoder have their published
shapes and run on shapes alone (PyTorch's fake tensors), by the calls of the families and with attention that never holds its matrix, as on
a GPU; the channel codes real numbers. A text encoder is run on as many tokens as it takes. What no count can know is left out: the CUDA
context, working memory within a kernel, and what the allocator's rounding loses. Where a GPU is at hand, `sd15_shape.py` measures all of it.

Columns: parameters of the text encoders, the network and the autoencoder; GiB of all weights; the most GiB with all of them on the
device; the same if `enable_model_cpu_offload` has one part there at a time, and which part that is; calls of the network to encode 12 steps, and
to decode them and finish in 10.
"""

import argparse
import math
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from unittest.mock import patch

import diffusers
import torch
import transformers
from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig, ChatGLMModel
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffusers_compress import DiffCPipeline, embedded_model
from diffusers_compress.coding.channels import CHANNELS, channel_of
from diffusers_compress.diffusion.schedule import from_pure_noise

STEPS, FINISHING = 12, 10  # network calls
GIB = 2**30

# ----------------------------------------------------------------------------------------------------------- published shapes


def kl(latent_channels, **config):
    """The autoencoder of Stable Diffusion, and with 16 channels of FLUX.1."""
    return diffusers.AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=latent_channels,
        **config,
    )


def flux_kl():
    return kl(16, use_quant_conv=False, use_post_quant_conv=False, scaling_factor=0.3611, shift_factor=0.1159)


def clip_l(tokens=77):
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    return transformers.CLIPTextModel(transformers.CLIPTextConfig(vocab_size=49_408, **sizes)), tokens


def clip_big(tokens=77):
    sizes = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
    config = transformers.CLIPTextConfig(vocab_size=49_408, projection_dim=1280, hidden_act="gelu", **sizes)
    return transformers.CLIPTextModelWithProjection(config), tokens


def t5_xxl(tokens):
    sizes = {"d_model": 4096, "d_kv": 64, "d_ff": 10_240, "num_layers": 24, "num_heads": 64, "feed_forward_proj": "gated-gelu"}
    return transformers.T5EncoderModel(transformers.T5Config(vocab_size=32_128, **sizes)), tokens


def gemma_2_2b(tokens):
    return transformers.Gemma2Model(transformers.Gemma2Config()), tokens


def qwen3_4b(tokens, kind):
    sizes = {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32}
    config = transformers.Qwen3Config(vocab_size=151_936, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True, **sizes)
    return getattr(transformers, kind)(config), tokens


def qwen_2_5_vl_7b(tokens):
    text = {
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152_064,
        "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6},
    }
    vision = {"hidden_size": 1280, "out_hidden_size": 3584}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return transformers.Qwen2_5_VLForConditionalGeneration(config), tokens


def chat_glm3_6b(tokens):
    attention = {"multi_query_attention": True, "multi_query_group_num": 2, "add_qkv_bias": True, "original_rope": True}
    return ChatGLMModel(ChatGLMConfig(**attention), empty_init=False), tokens  # the other sizes are the defaults


def bert_hunyuan(tokens=77):
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    return transformers.BertModel(transformers.BertConfig(vocab_size=47_020, **sizes)), tokens


def mt5_xl(tokens):
    sizes = {"d_model": 2048, "d_kv": 64, "d_ff": 5120, "num_layers": 24, "num_heads": 32, "feed_forward_proj": "gated-gelu"}
    return transformers.T5EncoderModel(transformers.T5Config(vocab_size=250_112, **sizes)), tokens


def mistral_3_24b(tokens):
    text = {
        "model_type": "mistral",
        "hidden_size": 5120,
        "intermediate_size": 32_768,
        "num_hidden_layers": 40,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 131_072,
    }
    config = transformers.Mistral3Config(text_config=text, tie_word_embeddings=False)
    return transformers.Mistral3ForConditionalGeneration(config), tokens


def diffusion(**config):
    return diffusers.DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, **config)


def flow():
    return diffusers.FlowMatchEulerDiscreteScheduler()


def sd_unet(**config):
    plain = {"sample_size": 64, "cross_attention_dim": 768}
    return diffusers.UNet2DConditionModel(**plain | config)


def sdxl_unet(**config):
    plain = {"addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816}
    return diffusers.UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=[1, 2, 10],
        attention_head_dim=[5, 10, 20],
        cross_attention_dim=2048,
        addition_embed_type="text_time",
        use_linear_projection=True,
        **plain | config,
    )


def sd3_transformer(layers, width, **config):
    plain = {
        "sample_size": 128,
        "in_channels": 16,
        "out_channels": 16,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 2048,
    }
    return diffusers.SD3Transformer2DModel(
        num_layers=layers, num_attention_heads=width // 64, caption_projection_dim=width, attention_head_dim=64, **plain | config
    )


def kolors_unet():
    return sdxl_unet(projection_class_embeddings_input_dim=5632, encoder_hid_dim=4096, encoder_hid_dim_type="text_proj")


def hunyuan_dit():
    return diffusers.HunyuanDiT2DModel(
        sample_size=128,
        num_layers=40,
        patch_size=2,
        in_channels=4,
        hidden_size=1408,
        mlp_ratio=4.3637,
        use_style_cond_and_image_meta_size=False,
    )


def celebahq_unet():
    """Of google/ddpm-celebahq-256."""
    return diffusers.UNet2DModel(
        sample_size=256,
        block_out_channels=(128, 128, 256, 256, 512, 512),
        down_block_types=("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 4,
        attention_head_dim=None,
    )


def klein_4b():
    return diffusers.Flux2Transformer2DModel(
        num_layers=5, num_single_layers=20, num_attention_heads=24, joint_attention_dim=7680, guidance_embeds=False
    )


def sana_autoencoder():
    blocks = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
    return diffusers.AutoencoderDC(
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        scaling_factor=0.41407,
    )


SD3_TEXTS = {"text_encoder": clip_l, "text_encoder_2": clip_big}


# Model -> its components, and the conditioning that the network sees: shapes by name. A text encoder comes with its number of tokens.
MODELS: dict[str, tuple[dict[str, Callable], dict[str, tuple[int, ...]]]] = {
    "Stable Diffusion 1.5": (
        {"text_encoder": clip_l, "unet": sd_unet, "vae": lambda: kl(4), "scheduler": diffusion},
        {"text": (77, 768)},
    ),
    "SDXL": (
        {
            "text_encoder": clip_l,
            "text_encoder_2": clip_big,
            "unet": sdxl_unet,
            "vae": lambda: kl(4, force_upcast=True),
            "scheduler": diffusion,
        },
        {"text": (77, 2048), "summary": (1280,)},
    ),
    "Kolors": (
        {
            "text_encoder": lambda: chat_glm3_6b(256),
            "unet": kolors_unet,
            "vae": lambda: kl(4),
            "scheduler": diffusion,
        },
        {"text": (256, 4096), "summary": (4096,)},
    ),
    "HunyuanDiT 1.2": (
        {
            "text_encoder": bert_hunyuan,
            "text_encoder_2": lambda: mt5_xl(256),
            "transformer": hunyuan_dit,
            "vae": lambda: kl(4),
            "scheduler": diffusion,
        },
        {"text": (77, 1024), "mask": (77,), "text_2": (256, 2048), "mask_2": (256,)},
    ),
    "PixArt-Sigma": (
        {
            "text_encoder": lambda: t5_xxl(300),
            "transformer": lambda: diffusers.PixArtTransformer2DModel(caption_channels=4096, use_additional_conditions=False),
            "vae": lambda: kl(4),
            "scheduler": diffusion,
        },
        {"text": (300, 4096), "mask": (300,)},
    ),
    "SANA 1.6B": (
        {
            "text_encoder": lambda: gemma_2_2b(600),
            "transformer": diffusers.SanaTransformer2DModel,
            "vae": sana_autoencoder,
            "scheduler": flow,
        },
        {"text": (300, 2304), "mask": (300,)},
    ),
    "Stable Diffusion 3.5 medium": (
        {
            **SD3_TEXTS,
            "text_encoder_3": lambda: t5_xxl(256),
            "transformer": lambda: sd3_transformer(
                24, 1536, qk_norm="rms_norm", dual_attention_layers=tuple(range(13)), pos_embed_max_size=384
            ),
            "vae": flux_kl,
            "scheduler": flow,
        },
        {"text": (333, 4096), "summary": (2048,)},
    ),
    "Stable Diffusion 3.5 large": (
        {
            **SD3_TEXTS,
            "text_encoder_3": lambda: t5_xxl(256),
            "transformer": lambda: sd3_transformer(38, 2432, qk_norm="rms_norm", pos_embed_max_size=192),
            "vae": flux_kl,
            "scheduler": flow,
        },
        {"text": (333, 4096), "summary": (2048,)},
    ),
    "Lumina-Image 2": (
        {
            "text_encoder": lambda: gemma_2_2b(256),
            "transformer": lambda: diffusers.Lumina2Transformer2DModel(cap_feat_dim=2304),
            "vae": flux_kl,
            "scheduler": flow,
        },
        {"text": (256, 2304), "mask": (256,)},
    ),
    "Z-Image": (
        {
            "text_encoder": lambda: qwen3_4b(512, "Qwen3Model"),
            "transformer": diffusers.ZImageTransformer2DModel,
            "vae": flux_kl,
            "scheduler": flow,
        },
        {"text": (512, 2560), "length": ()},
    ),
    "FLUX.1 dev": (
        {
            "text_encoder": clip_l,
            "text_encoder_2": lambda: t5_xxl(512),
            "transformer": lambda: diffusers.FluxTransformer2DModel(guidance_embeds=True),
            "vae": flux_kl,
            "scheduler": flow,
        },
        {"text": (512, 4096), "summary": (768,)},
    ),
    "FLUX.2 klein 4B": (
        {
            "text_encoder": lambda: qwen3_4b(512, "Qwen3ForCausalLM"),
            "transformer": klein_4b,
            "vae": diffusers.AutoencoderKLFlux2,
            "scheduler": flow,
        },
        {"text": (512, 7680)},
    ),
    "FLUX.2 dev": (
        {
            "text_encoder": lambda: mistral_3_24b(512),
            "transformer": diffusers.Flux2Transformer2DModel,
            "vae": diffusers.AutoencoderKLFlux2,
            "scheduler": flow,
        },
        {"text": (512, 15_360)},
    ),
    "Qwen-Image": (
        {
            "text_encoder": lambda: qwen_2_5_vl_7b(1058),
            "transformer": diffusers.QwenImageTransformer2DModel,
            "vae": diffusers.AutoencoderKLQwenImage,
            "scheduler": flow,
        },
        {"text": (1024, 3584), "length": ()},
    ),
    "pixel space, ddpm-celebahq-256": ({"unet": celebahq_unet, "scheduler": diffusers.DDPMScheduler}, {}),
}


# ------------------------------------------------------------------------------------------------------------------ counting


class LiveBytes(TorchDispatchMode):
    """`peak`: the most bytes that storages made under this mode had together."""

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.known = 0, 0, weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.known.update(dict.fromkeys(storages((arguments, options))))  # weights
        result = function(*arguments, **(options or {}))
        for storage in storages(result):
            if storage not in self.known:
                self.known[storage] = None
                self.live += storage.nbytes()
                weakref.finalize(storage, self.freed, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return result

    def freed(self, size):
        self.live -= size


def storages(values):
    return [value.untyped_storage() for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


def peak_of(function):
    with LiveBytes() as count:
        function()
    return count.peak


def parameters(module):
    return sum(weight.numel() for weight in module.parameters())


def bytes_of(module):
    return sum(weight.numel() * weight.element_size() for weight in (*module.parameters(), *module.buffers()))


def channel_peaks(latent, budget):
    """Of the channel alone, in a step of so many bits on a latent of this shape."""
    peaks = {}
    for name in ("trellis", "trellis32"):
        channel, n = channel_of(CHANNELS[name].number), math.prod(latent)
        shift, rank = torch.randn(1, n), torch.zeros(1, n, dtype=torch.int64)
        shift *= math.sqrt(2 * math.log(2) * budget) / shift.norm()
        peaks[f"channel {name}"] = peak_of(lambda: channel.encode(shift, shift.square(), rank, budget, 1))
    return peaks


@torch.no_grad()
def measure(model, width, height, dtype, bpp, tiling):
    """Numbers of parameters of a model's parts, their bytes, and the peak of each part's work without its weights; and the pipeline."""
    made, conditioning = MODELS[model]
    modules, tokens, peaks = {"scheduler": made["scheduler"]()}, {}, {}
    tokenizer = transformers.CLIPTokenizer.from_pretrained(embedded_model(), subfolder="tokenizer")
    with FakeTensorMode():
        torch.set_default_dtype(dtype)
        for name in made.keys() - modules.keys():
            part = made[name]()
            modules[name], tokens[name] = part if isinstance(part, tuple) else (part, None)
        torch.set_default_dtype(torch.float32)
        for name in [name for name in tokens if tokens[name]]:
            modules[name.replace("text_encoder", "tokenizer")] = tokenizer  # never called
        pipe = DiffCPipeline(**modules)
        for part in pipe.components.values():
            if isinstance(part, torch.nn.Module):
                part.eval()
        if tiling and pipe.vae is not None:
            pipe.vae.enable_tiling()
        for name in [name for name in tokens if tokens[name]]:
            ids = torch.zeros(1, tokens[name], dtype=torch.int64)
            peaks[name] = peak_of(lambda ids=ids, name=name: modules[name](ids, output_hidden_states=True))
        latent = pipe.latent_shape(height, width)
        told = {name: torch.ones(1, *shape, dtype=dtype) for name, shape in conditioning.items()}
        told |= {name: torch.ones(1, *conditioning[name]) for name in ("mask",) if name in told}
        # lengths that networks ask for are those of a text without padding: a fake tensor has no values
        lengths = patch.object(FakeTensor, "tolist", lambda mask: [conditioning["text"][0]])
        with lengths if {"mask", "length"} & told.keys() else nullcontext():
            network = pipe.family.network
            peaks[network] = peak_of(lambda: pipe.predict(torch.zeros(1, *latent), [500], told))
        peaks["vae, encoding"] = peak_of(lambda: pipe.family.encode_picture(torch.zeros(1, 3, height, width)))
        peaks["vae, decoding"] = peak_of(lambda: pipe.family.decode_latent(torch.zeros(1, *latent)))
    counts = {name: parameters(part) for name, part in modules.items() if isinstance(part, torch.nn.Module)}
    sizes = {name: bytes_of(modules[name]) for name in counts}
    peaks |= channel_peaks(latent, math.ceil(bpp * width * height / STEPS))
    return counts, sizes, peaks, pipe


def row(model, counts, sizes, peaks, pipe):
    """Of the table: see the top."""
    texts = sum(count for name, count in counts.items() if name.startswith("text_encoder"))
    weights = sum(sizes.values())
    alone = {part: peak + sizes.get(part.partition(",")[0], 0) for part, peak in peaks.items()}
    worst = max(alone, key=alone.get)
    first = 0 if from_pure_noise(pipe.noise_schedule()).knows_last else 1  # which is not asked at pure noise
    numbers = " + ".join(f"{count / 1e9:.2f}" for count in (texts, counts[pipe.family.network], counts.get("vae", 0)))
    calls = f"{STEPS - first}, {STEPS - first + FINISHING}"
    memory = f"{weights / GIB:.1f} | {(weights + max(peaks.values())) / GIB:.1f} | {alone[worst] / GIB:.1f} ({worst})"
    return f"| {model} | {numbers} | {memory} | {calls} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(MODELS)}; default: all, as a table")
    parser.add_argument("--size", type=int, nargs=2, default=[1024, 1024], metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="bfloat16")
    parser.add_argument("--bpp", type=float, default=0.03)
    parser.add_argument("--tiling", action="store_true", help="vae.enable_tiling()")
    args = parser.parse_args()
    width, height = args.size
    if not args.models:
        print("| model | parameters, 10^9 | weights, GiB | at most | with offloading | calls |")
        print("|--|--|--|--|--|--|")
    for model in args.models or MODELS:
        counts, sizes, peaks, pipe = measure(model, width, height, getattr(torch, args.dtype), args.bpp, args.tiling)
        print(row(model, counts, sizes, peaks, pipe), flush=True)
        if args.models:
            weights = sum(sizes.values())
            print(f"{width}x{height}, {args.dtype}, weights {weights / GIB:.2f} GiB; with all weights at most:")
            for part, peak in peaks.items():
                print(f"{part:18} {(weights + peak) / GIB:5.2f} GiB")


if __name__ == "__main__":
    main()
