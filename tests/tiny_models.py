"""Families of diffusion models in miniature, random and real: diffusers' own pipelines, which tests save and load."""

import functools
import string
import tempfile

import diffusers
import torch
from diffusers import AutoencoderKL
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PixtralImageProcessor,
    PixtralProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

CHAT = "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{% endfor %}"
SD_NOISE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}


def clip_tokenizer() -> CLIPTokenizer:
    """Knows the lower-case letters, alone and at a word's end, and no merges."""
    tokens = [
        *string.ascii_lowercase,
        *(letter + "</w>" for letter in string.ascii_lowercase),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return CLIPTokenizer(vocabulary, [], model_max_length=77, pad_token="<|endoftext|>")


def t5_tokenizer() -> T5TokenizerFast:
    vocabulary = [
        ("<pad>", 0.0),
        ("</s>", 0.0),
        ("<unk>", 0.0),
        ("\u2581", -2.0),
        *((letter, -3.0) for letter in string.ascii_lowercase),
    ]
    return T5TokenizerFast(vocab=vocabulary, extra_ids=0, model_max_length=512)


def clip(tokenizer, projection=False, layers=1):
    """Text encoder of width 16."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        projection_dim=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def t5(tokenizer):
    """Text encoder of width 32."""
    config = T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
    return T5EncoderModel(config).eval()


def autoencoder(latent_channels=4, **config):
    """Of factor 8."""
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=latent_channels,
        sample_size=64,
        **config,
    )
    if vae.quant_conv is not None:
        vae.quant_conv.weight.data *= 30  # latents of about unit variance, as a trained one's are
    return vae


def unet(**config):
    plain = {
        "block_out_channels": (8, 16),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 4,
        "cross_attention_dim": 16,
        "sample_size": 8,
    }
    return diffusers.UNet2DConditionModel(**plain | config)


def stable_diffusion(scheduler="PNDMScheduler", **noise):
    torch.manual_seed(0)
    parts = {"vae": autoencoder(), "unet": unet(), "tokenizer": clip_tokenizer()}
    parts["text_encoder"] = clip(parts["tokenizer"])
    parts["scheduler"] = getattr(diffusers, scheduler)(**SD_NOISE | noise)
    absent = dict.fromkeys(("safety_checker", "feature_extractor", "image_encoder"))
    return diffusers.StableDiffusionPipeline(**parts, **absent, requires_safety_checker=False)


def sd_epsilon():
    """As Stable Diffusion 1.x."""
    return stable_diffusion(skip_prk_steps=True, set_alpha_to_one=False)


def sd_v_prediction():
    """As Stable Diffusion 2.x."""
    return stable_diffusion("DDIMScheduler", prediction_type="v_prediction", set_alpha_to_one=False, clip_sample=False)


def sd_turbo():
    return stable_diffusion("EulerDiscreteScheduler", timestep_spacing="trailing")


def sdxl():
    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    added = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 16,
    }
    return diffusers.StableDiffusionXLPipeline(
        vae=autoencoder(scaling_factor=0.13025, force_upcast=True),
        text_encoder=clip(tokenizer, layers=2),
        text_encoder_2=clip(tokenizer, projection=True, layers=2),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet(cross_attention_dim=32, use_linear_projection=True, **added),
        scheduler=diffusers.EulerDiscreteScheduler(**SD_NOISE, timestep_spacing="leading"),
    )


def sd3():
    torch.manual_seed(0)
    tokenizer, tokenizer_3 = clip_tokenizer(), t5_tokenizer()
    return diffusers.StableDiffusion3Pipeline(
        transformer=diffusers.SD3Transformer2DModel(
            sample_size=32,
            patch_size=2,
            in_channels=16,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=32,
            caption_projection_dim=32,
            pooled_projection_dim=32,
            out_channels=16,
            pos_embed_max_size=32,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(16, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip(tokenizer, projection=True, layers=2),
        tokenizer=tokenizer,
        text_encoder_2=clip(tokenizer, projection=True, layers=2),
        tokenizer_2=tokenizer,
        text_encoder_3=t5(tokenizer_3),
        tokenizer_3=tokenizer_3,
    )


def flux(guidance=False):
    torch.manual_seed(0)
    tokenizer, tokenizer_2 = clip_tokenizer(), t5_tokenizer()
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=flux_latents(),
        text_encoder=clip(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=t5(tokenizer_2),
        tokenizer_2=tokenizer_2,
        transformer=diffusers.FluxTransformer2DModel(
            in_channels=64,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=16,
            axes_dims_rope=(4, 4, 8),
            guidance_embeds=guidance,
        ),
    )


def flux_dev():
    return flux(guidance=True)


def qwen_tokenizer():
    """Knows bytes and no merges."""
    tokens = [*sorted(bytes_to_unicode().values()), "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return Qwen2Tokenizer({token: number for number, token in enumerate(tokens)}, [], chat_template=CHAT)


def gemma():
    """Tokenizer and text encoder of width 32."""
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "\u2581", *string.printable]
    tokenizer = GemmaTokenizer({token: number for number, token in enumerate(tokens)}, [], model_max_length=512)
    return {"tokenizer": tokenizer, "text_encoder": Gemma2Model(Gemma2Config(vocab_size=len(tokenizer), **language(2))).eval()}


def language(layers, **config):
    """Of a language model of width 32."""
    plain = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
    }
    return plain | config


def flux_latents():
    return autoencoder(16, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False)


def sana():
    torch.manual_seed(0)
    blocks = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in (
            ("block_types", ("ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock")),
            ("block_out_channels", (8,) * 4),
            ("layers_per_block", (1,) * 4),
            ("qkv_multiscales", ((), (), (), (5,))),
        )
    }
    return diffusers.SanaPipeline(
        **gemma(),
        vae=diffusers.AutoencoderDC(latent_channels=8, attention_head_dim=4, scaling_factor=0.41407, **blocks),
        transformer=diffusers.SanaTransformer2DModel(
            in_channels=8,
            out_channels=8,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=1,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=32,
        ),
        scheduler=diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0),
    )


def pixart():
    torch.manual_seed(0)
    tokenizer = t5_tokenizer()
    return diffusers.PixArtSigmaPipeline(
        tokenizer=tokenizer,
        text_encoder=t5(tokenizer),
        vae=autoencoder(scaling_factor=0.13025),
        transformer=diffusers.PixArtTransformer2DModel(
            sample_size=8,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            cross_attention_dim=16,
            caption_channels=32,
            use_additional_conditions=False,
        ),
        scheduler=diffusers.DPMSolverMultistepScheduler(**SD_NOISE),
    )


def hunyuan_dit():
    torch.manual_seed(0)
    tokens = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        *(start + letter for start in ("", "##") for letter in string.printable),
    ]
    tokenizer = BertTokenizer({token: number for number, token in enumerate(tokens)}, model_max_length=77)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokenizer_2 = t5_tokenizer()
    return diffusers.HunyuanDiTPipeline(
        text_encoder=BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).eval(),
        tokenizer=tokenizer,
        text_encoder_2=t5(tokenizer_2),
        tokenizer_2=tokenizer_2,
        vae=autoencoder(scaling_factor=0.13025),
        transformer=diffusers.HunyuanDiT2DModel(
            sample_size=8,
            num_layers=4,
            patch_size=2,
            in_channels=4,
            num_attention_heads=2,
            attention_head_dim=8,
            hidden_size=16,
            cross_attention_dim=16,
            cross_attention_dim_t5=32,
            pooled_projection_dim=8,
        ),
        scheduler=diffusers.DDPMScheduler(**SD_NOISE | {"beta_end": 0.02}, prediction_type="v_prediction"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@functools.cache
def sentences() -> tempfile.TemporaryDirectory:
    """A folder with a model of sentencepiece that knows the lower-case letters: ChatGLM's tokenizer reads it again when it is saved."""
    import sentencepiece

    folder, letters = tempfile.TemporaryDirectory(), " ".join(string.ascii_lowercase)
    options = {"model_type": "char", "vocab_size": 30, "minloglevel": 2}
    with open(f"{folder.name}/tokenizer.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter([letters]), model_writer=file, **options)
    return folder


def chat_glm():
    """Tokenizer and text encoder of width 32."""
    from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig, ChatGLMModel
    from diffusers.pipelines.kolors.tokenizer import ChatGLMTokenizer

    tokenizer = ChatGLMTokenizer(f"{sentences().name}/tokenizer.model")
    sizes = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 32, "kv_channels": 8, "num_attention_heads": 4}
    attention = {"multi_query_attention": True, "multi_query_group_num": 2, "add_qkv_bias": True, "original_rope": True}
    encoder = ChatGLMModel(ChatGLMConfig(padded_vocab_size=64, **sizes, **attention)).eval()
    for weight in encoder.parameters():  # which begin as whatever is in memory
        weight.data.normal_(std=0.3)
    return {"tokenizer": tokenizer, "text_encoder": encoder}


def kolors():
    torch.manual_seed(0)
    added = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 32,
        "encoder_hid_dim": 32,
        "encoder_hid_dim_type": "text_proj",
    }
    return diffusers.KolorsPipeline(
        **chat_glm(),
        vae=autoencoder(scaling_factor=0.13025),
        unet=unet(use_linear_projection=True, **added),
        scheduler=diffusers.EulerDiscreteScheduler(**SD_NOISE, timestep_spacing="leading"),
    )


def lumina_2():
    torch.manual_seed(0)
    return diffusers.Lumina2Pipeline(
        **gemma(),
        vae=flux_latents(),
        transformer=diffusers.Lumina2Transformer2DModel(
            sample_size=8,
            in_channels=16,
            hidden_size=24,
            num_layers=1,
            num_refiner_layers=1,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=8,
            axes_dim_rope=(4, 4, 4),
            cap_feat_dim=32,
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=6.0),
    )


def z_image():
    torch.manual_seed(0)
    tokenizer = qwen_tokenizer()
    return diffusers.ZImagePipeline(
        tokenizer=tokenizer,
        text_encoder=Qwen3Model(Qwen3Config(vocab_size=len(tokenizer), **language(2))).eval(),
        vae=flux_latents(),
        transformer=diffusers.ZImageTransformer2DModel(
            dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=32, axes_dims=[8, 4, 4]
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def qwen_image():
    torch.manual_seed(0)
    tokenizer = qwen_tokenizer()
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e6}
    config = Qwen2_5_VLConfig(
        text_config=language(1, vocab_size=len(tokenizer), rope_parameters=rope),
        vision_config={"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32},
    )
    return diffusers.QwenImagePipeline(
        tokenizer=tokenizer,
        text_encoder=Qwen2_5_VLForConditionalGeneration(config).eval(),
        vae=diffusers.AutoencoderKLQwenImage(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            latents_mean=[0.1, -0.2, 0.3, 0.0],
            latents_std=[0.5, 0.6, 0.7, 0.8],
        ),
        transformer=diffusers.QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            axes_dims_rope=(4, 6, 6),
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=True),
    )


def flux_2_parts(width, guidance):
    """On a text encoder of this width, from which three layers are taken."""
    vae = diffusers.AutoencoderKLFlux2(
        block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=4, latent_channels=4, sample_size=64
    )
    vae.bn.running_mean.uniform_(-0.5, 0.5)
    vae.bn.running_var.uniform_(0.5, 2)
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * width,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance,
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    return {"vae": vae, "transformer": transformer, "scheduler": scheduler}


def flux_2():
    """As FLUX.2 dev, whose text comes from layers 10, 20 and 30."""
    torch.manual_seed(0)
    tokens = [*sorted(bytes_to_unicode().values()), "<pad>", "[IMG]", "[IMG_BREAK]", "[IMG_END]"]
    tokenizer = Qwen2Tokenizer({token: number for number, token in enumerate(tokens)}, [], pad_token="<pad>")
    config = Mistral3Config(
        text_config=language(30, vocab_size=len(tokenizer), model_type="mistral"),
        vision_config=language(1, model_type="pixtral", image_size=32, patch_size=8),
    )
    chat = (
        "{% for message in messages %}{{ message.role }}:{% for part in message.content %}{{ part.text }}{% endfor %}{% endfor %}"
    )
    return diffusers.Flux2Pipeline(
        tokenizer=PixtralProcessor(PixtralImageProcessor(), tokenizer, chat_template=chat),
        text_encoder=Mistral3ForConditionalGeneration(config).eval(),
        **flux_2_parts(32, guidance=True),
    )


def flux_2_klein():
    """Whose text comes from layers 9, 18 and 27."""
    torch.manual_seed(0)
    tokenizer = qwen_tokenizer()
    return diffusers.Flux2KleinPipeline(
        tokenizer=tokenizer,
        text_encoder=Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tokenizer), **language(27))).eval(),
        **flux_2_parts(32, guidance=False),
    )


def pixels():
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=32,
        block_out_channels=(8, 16, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
    )
    # Of an untrained network's epsilon, x_0_hat would be a hundred times too large where this schedule begins.
    return diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler(prediction_type="v_prediction"))


DIFFUSION = (sd_epsilon, sd_v_prediction, sd_turbo, sdxl, kolors, pixart, hunyuan_dit, pixels)
FLOW = (sd3, flux, flux_dev, flux_2, flux_2_klein, sana, lumina_2, qwen_image, z_image)
FAMILIES = {make.__name__: make for make in (*DIFFUSION, *FLOW)}
