"""The types of all families' components, as the pipelines name them: `from_pipe` takes over a network only if its class stands here."""

from diffusers import (
    AsymmetricAutoencoderKL,
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderTiny,
    FlowMatchEulerDiscreteScheduler,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    HunyuanDiT2DModel,
    Lumina2Transformer2DModel,
    PixArtTransformer2DModel,
    QwenImageTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
    ZImageTransformer2DModel,
)
from diffusers.schedulers import KarrasDiffusionSchedulers
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

Scheduler = KarrasDiffusionSchedulers | FlowMatchEulerDiscreteScheduler
Autoencoder = (
    AutoencoderKL | AutoencoderDC | AutoencoderTiny | AsymmetricAutoencoderKL | AutoencoderKLFlux2 | AutoencoderKLQwenImage
)
UNet = UNet2DConditionModel | UNet2DModel
Transformer = (
    SD3Transformer2DModel
    | FluxTransformer2DModel
    | Flux2Transformer2DModel
    | SanaTransformer2DModel
    | PixArtTransformer2DModel
    | HunyuanDiT2DModel
    | Lumina2Transformer2DModel
    | QwenImageTransformer2DModel
    | ZImageTransformer2DModel
)
TextEncoder = PreTrainedModel
Tokenizer = PreTrainedTokenizerBase | ProcessorMixin
