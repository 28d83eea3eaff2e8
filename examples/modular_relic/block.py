"""Relic as blocks of Modular Diffusers: `encode`, `code` and `reconstruct`, to be run together, alone or among blocks of others.

This folder is a repository of blocks: it holds no weights, and takes those of any Stable Diffusion 1.x or 2.x.

    from diffusers import ModularPipelineBlocks

    blocks = ModularPipelineBlocks.from_pretrained("examples/modular_relic", trust_remote_code=True)
    pipe = blocks.init_pipeline("stable-diffusion-v1-5/stable-diffusion-v1-5")
    pipe.load_components()
    files = pipe(image=[image], target_bpp=0.1, output="bitstreams")

    decoder = blocks.sub_blocks["reconstruct"].init_pipeline("stable-diffusion-v1-5/stable-diffusion-v1-5")
    decoder.load_components()
    pictures = decoder(bitstreams=files, output="images")

The files are those of `RelicPipeline`. A block between `encode` and `code` may change the latents.
"""

from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.modular_pipelines import (
    ComponentSpec,
    InputParam,
    ModularPipelineBlocks,
    OutputParam,
    SequentialPipelineBlocks,
)
from transformers import CLIPTextModel, CLIPTokenizer

from diffusers_compress import RelicPipeline, images

COMPONENTS = {
    "scheduler": DDIMScheduler,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "tokenizer": CLIPTokenizer,
    "unet": UNet2DConditionModel,
}
IMAGE = InputParam("image", required=True, description="PIL pictures, arrays or tensors: a list, or one.")
PROMPT = InputParam("prompt", default="", description="One for all, or one for each picture; it stands in the file.")


class FromLatents(RelicPipeline):
    """Codes pictures whose scaled latents are given."""

    def encode_groups(self, pictures, batch_size):
        return (([i], latent) for i, latent in enumerate(self.latents))


class RelicBlock(ModularPipelineBlocks):
    """With the components of a Stable Diffusion model."""

    model_name = "relic"

    @property
    def expected_components(self):
        return [ComponentSpec(name, kind) for name, kind in COMPONENTS.items()]

    def codec(self, components, kind=RelicPipeline):
        codec = kind(**{name: getattr(components, name) for name in COMPONENTS})
        codec.set_progress_bar_config(disable=True)
        return codec


class Encode(RelicBlock):
    """Pictures to latents."""

    description = "Encodes pictures by the autoencoder: the mean of their latents, scaled."
    inputs = [IMAGE]
    intermediate_outputs = [OutputParam("latents", type_hint=list, description="A tensor [1, C, h, w] for each picture.")]

    def __call__(self, components, state):
        block, codec = self.get_block_state(state), self.codec(components)
        pictures = [images.to_tensor(picture)[0] for picture in images.as_list(block.image)]
        block.latents = [codec.encode_picture(codec.pad(x)[None]) for x in pictures]
        self.set_block_state(state, block)
        return components, state


class Code(RelicBlock):
    """Latents to files."""

    description = "Quantizes latents and codes them as whole files; the pictures give the sizes."
    inputs = [
        IMAGE,
        InputParam("latents", required=True),
        *(InputParam(name) for name in ("target_bpp", "max_bytes", "fidelity")),
        PROMPT,
    ]
    intermediate_outputs = [OutputParam("bitstreams", type_hint=list, description="A file as bytes for each picture.")]

    def __call__(self, components, state):
        block, codec = self.get_block_state(state), self.codec(components, FromLatents)
        codec.latents = block.latents
        rate = {"target_bpp": block.target_bpp, "max_bytes": block.max_bytes, "fidelity": block.fidelity}
        block.bitstreams = codec.compress(block.image, prompt=block.prompt, **rate).bitstreams
        self.set_block_state(state, block)
        return components, state


class Reconstruct(RelicBlock):
    """Files to pictures."""

    description = "Decodes files, and removes the quantizer's error by the diffusion model."
    inputs = [
        InputParam("bitstreams", required=True),
        InputParam("num_inference_steps", default=10, description="Network calls."),
        InputParam("output_type", default="pil"),
    ]
    intermediate_outputs = [OutputParam("images", type_hint=list)]

    def __call__(self, components, state):
        block, codec = self.get_block_state(state), self.codec(components)
        steps, kind = block.num_inference_steps, block.output_type
        block.images = codec.decompress(block.bitstreams, num_inference_steps=steps, output_type=kind).images
        self.set_block_state(state, block)
        return components, state


class RelicBlocks(SequentialPipelineBlocks):
    """Pictures to files and back."""

    model_name = "relic"
    block_classes = [Encode, Code, Reconstruct]
    block_names = ["encode", "code", "reconstruct"]
    description = "Image compression by the quantized latent of a diffusion model, which removes the quantizer's error."
