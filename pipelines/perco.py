"""PerCo: a caption and a vector-quantized sketch of the latent; a diffusion model that was trained for both paints the picture.

Careil et al., Towards image compression with perfect realism at ultra-low bitrates (ICLR 2024):

    picture --VAE--> x_0 --hyper-encoder, nearest codes--> grid of indices --(bits)--> grid --codebook--> z_hat
        noise --(network sees [x_t, z_hat] and the caption at each step)--> x_0 --VAE--> picture

The file is small whatever the picture: the grid has so many cells per pixel, and nothing that is read depends on a network's output.
"""

import math
import os
from collections.abc import Callable
from typing import Self, Unpack

import torch
from diffusers import AutoencoderDC, AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from diffusers.image_processor import PipelineImageInput
from diffusers.schedulers import KarrasDiffusionSchedulers
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from diffusers_compress import images, loading
from diffusers_compress.arguments import check_walk, prompts_of
from diffusers_compress.codecs.perco.format import MAX_SEED, WORDS, Parameters, read_file
from diffusers_compress.codecs.perco.payload import bits_of, smallest_file, unpack_payload
from diffusers_compress.coding import randomness
from diffusers_compress.coding.text import vocabulary_of
from diffusers_compress.contract import PERCO
from diffusers_compress.diffusion import solvers
from diffusers_compress.diffusion.families.common import scale_factor_of
from diffusers_compress.diffusion.families.stable_diffusion import StableDiffusion
from diffusers_compress.diffusion.realism import dial
from diffusers_compress.errors import WrongModel
from diffusers_compress.format.limits import DEFAULT_LIMITS, Limits
from diffusers_compress.latent_pipeline import LatentCodecMixin
from diffusers_compress.models import adapter
from diffusers_compress.models.hyper_encoder import HyperEncoder
from diffusers_compress.outputs import CompressOutput, DecompressOutput
from diffusers_compress.pipeline import Decoding, Rate, Watch, compressed, groups_of

UNTRAINED = (
    "this folder has no hyper-encoder, or a UNet that does not see its features: PerCo needs a model that was trained for it. "
    "examples/train_perco.py trains one over any Stable-Diffusion folder, examples/convert_perco.py takes over the published PerCo (SD) "
    'weights, and diffusers_compress.embedded_model("perco") is a small one'
)


class PerCoPipeline(LatentCodecMixin, DiffusionPipeline):
    """Image codec from a Stable-Diffusion model that was trained to paint pictures from a sketch of a few bytes and a caption.

    `from_pretrained` takes a folder or Hub id that one of these pipelines was saved to, or an adapter as `examples/train_perco.py` writes
    it, which names its base. `compress` gives whole files as bytes, `decompress` gives pictures, calling the pipeline does both.

    Args:
        vae, text_encoder, tokenizer, scheduler: as in `StableDiffusionPipeline`. The scheduler gives the noise levels; its sampler,
            which must be one for the probability-flow ODE, paints the picture in `decompress`.
        unet: sees the noisy latent and the hyper-encoder's features, in that order of channels.
        hyper_encoder: makes the sketch; its codebook and grid decide the rate.
    """

    model_cpu_offload_seq = "text_encoder->hyper_encoder->unet->vae"
    _optional_components = ["hyper_encoder"]
    plain_network = False

    def __init__(
        self,
        vae: AutoencoderKL | AutoencoderDC,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
        hyper_encoder: HyperEncoder | None = None,
    ):
        super().__init__()
        self.register_modules(vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler)
        self.register_modules(hyper_encoder=hyper_encoder)
        self.vae_scale_factor = scale_factor_of(vae)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, preset: str | float | None = None, **options
    ) -> Self:
        """As diffusers', and takes an adapter too.

        Of a folder with adapters for several rates `preset` names one ("0.0019"), or says how many bits per pixel the grid may take.
        ValueError for a model that was not trained for PerCo, unless `hyper_encoder` is given (None to train one).
        """
        options = loading.with_dtypes(options)
        folder = adapter.find(pretrained_model_name_or_path, preset, **options)
        if folder is not None:
            options.pop("revision", None)  # the adapter's, not its base's
            if "hyper_encoder" not in options:
                dtype = adapter.dtype_of(options, "hyper_encoder")
                options["hyper_encoder"] = HyperEncoder.from_pretrained(folder, subfolder="hyper_encoder", torch_dtype=dtype)
            pipe = super().from_pretrained(adapter.base_of(folder), **adapter.with_float32(options, "unet"))
            adapter.apply(pipe.unet, folder, adapter.dtype_of(options, "unet"))
            return pipe
        pipe = super().from_pretrained(pretrained_model_name_or_path, **options)
        if "hyper_encoder" not in options:
            pipe.check_trained()
        return pipe

    # ------------------------------------------------------------------------------------------------------ public calls

    def compress(
        self,
        image: PipelineImageInput,
        prompt: str | list[str] = "",
        captioner: Callable | None = None,
        seed: int = 0,
        batch_size: int = 8,
        **rate: Unpack[Rate],
    ) -> CompressOutput:
        """Pictures to files. The model's grid decides their size; a caption adds to it.

        Args:
            image: one or a list, of any sizes: PIL pictures, numpy arrays [H, W, C] or tensors [C, H, W] (see `images.to_tensor`).
            prompt: the caption, one for all or one for each picture; it costs nothing if empty.
            captioner: makes the captions instead: a function from a list of PIL pictures to texts, such as `captions.load_captioner`'s.
            seed: of the noise that a decoder starts from, 0 to 2**32 - 1; stored in the file.
            batch_size: pictures of like size that go through the networks together at most.
            rate: `target_bpp` or `max_bytes`, which no file may exceed; neither need be given.

        Raises:
            ValueError: for an argument out of its range, an untrained model, or a file that exceeds its permitted size.
        """
        if seed not in range(MAX_SEED + 1):
            raise ValueError(f"seed must be a whole number from 0 to {MAX_SEED}, not {seed}")
        self.check_trained()
        pictures = self.read_pictures(PERCO, image, **rate)
        prompts = prompts_of(prompt, len(pictures), DEFAULT_LIMITS.prompt_bytes)
        if captioner is not None:
            if any(prompts):
                raise ValueError("give prompt or captioner, not both")
            prompts = captioner([images.to_output(picture.x[None])[0] for picture in pictures])

        files = [b""] * len(pictures)
        with self.labelled_bar("pictures", len(pictures)) as bar:
            for group, x_0 in self.encode_groups(pictures, batch_size):
                for i, grid in zip(group, self.hyper_encoder.encode(x_0).cpu().numpy()):
                    header, limit = pictures[i].header, pictures[i].max_bytes
                    files[i] = smallest_file(header, grid, prompts[i], seed, self.hyper_encoder, self.tokenizer)
                    if len(files[i]) > limit:
                        raise ValueError(
                            f"a {header.width}x{header.height} picture may take {int(limit)} bytes here; with this model's grid of "
                            f"{grid.shape[1]}x{grid.shape[0]} cells and its caption the file has {len(files[i])}"
                        )
                    bar.update()
        return compressed(files, pictures)

    def decompress(
        self,
        bitstreams: bytes | list[bytes],
        num_inference_steps: int = 20,
        realism: float = 1.0,
        guidance_scale: float = 3.0,
        **shared: Unpack[Decoding],
    ) -> DecompressOutput:
        """Files to pictures of their original sizes.

        Args:
            bitstreams: one file or a list.
            num_inference_steps: network calls; published: 20, and 5 above 0.05 bits per pixel.
            realism: in [0, 1], between the mean of all such pictures, as the first call guesses it, and one of them, see `diffusion.realism`.
            guidance_scale: above 1, guidance towards the file's caption; the sketch stays in both branches. Published: 3.
            shared: `limits`, `batch_size` and others that every codec takes, see `contract.ImageCodec.decompress`. The
                codebook must be the file's own.

        Raises:
            BitstreamError: `NotABitstream`, `UnsupportedVersion`, `Corrupt`, `WrongModel`, `LimitExceeded`.
            ValueError: for an argument out of its range, or an untrained model.
        """
        check_walk(num_inference_steps, realism)
        self.check_trained()
        opened = self.read_files(read_file, bitstreams, **shared)
        files = opened.contents
        shapes = [self.latent_shape(header.height, header.width) for header, *_ in files]
        read = [
            self.read_payload(payload, parameters, shape, opened.limits) for (_, parameters, payload), shape in zip(files, shapes)
        ]

        pictures = [None] * len(files)
        for group in groups_of(opened.batch_size, shapes):
            headers, seeds = [files[i][0] for i in group], [files[i][1].seed for i in group]
            grids, texts = zip(*(read[i] for i in group))
            shape = shapes[group[0]]
            x_0 = self.paint(
                torch.stack(grids), list(texts), seeds, shape, num_inference_steps, guidance_scale, opened.watch, realism
            )
            for i, picture in zip(group, self.pictures_of(self.decode_latent(x_0), headers, opened.output_type)):
                pictures[i] = picture
        return DecompressOutput(images=pictures, notes=opened.notes)

    # ------------------------------------------------------------------------------------------------------------ steps

    def check_trained(self) -> None:
        """ValueError unless the UNet sees the hyper-encoder's features."""
        channels = self.vae.config.latent_channels
        if self.hyper_encoder is None or self.unet.config.in_channels != channels + self.hyper_encoder.extra_channels:
            raise ValueError(UNTRAINED)

    def read_payload(
        self, payload: bytes, parameters: Parameters, latent_shape: tuple[int, int, int], limits: Limits
    ) -> tuple[Tensor, str]:
        """(grid [a, b], caption) of a file. WrongModel if this model has another grid, or the caption needs another tokenizer."""
        config, codebook = self.hyper_encoder.config, self.hyper_encoder.probability_model()
        if (parameters.stride, parameters.bits) != (config.stride, bits_of(codebook.size)):
            raise WrongModel(
                f"the file's grid has stride {parameters.stride} and indices of {parameters.bits} bits, this model's has "
                f"{config.stride} and {bits_of(codebook.size)}; load the model that it was made with (preset {parameters.preset})"
            )
        vocabulary = vocabulary_of(self.tokenizer)
        if parameters.caption == WORDS and parameters.vocabulary != vocabulary.identity & 0xFF:
            raise WrongModel("the file's caption was coded with another tokenizer; load the model that the file was made with")
        shape = self.hyper_encoder.grid_shape(*latent_shape[1:])
        grid, caption = unpack_payload(payload, parameters, shape, codebook, vocabulary, limits)
        return torch.from_numpy(grid), caption

    def paint(
        self,
        grids: Tensor,
        texts: list[str],
        seeds: list[int],
        shape: tuple[int, int, int],
        num_inference_steps: int,
        guidance_scale: float,
        watch: Watch = None,
        realism: float = 1.0,
    ) -> Tensor:
        """x_0 [B, C, h, w] from grids [B, a, b], captions and seeds, in so many network calls."""
        noise, device = self.noise_schedule(), self._execution_device
        x_t = torch.stack([randomness.normals(math.prod(shape), randomness.START, seed).reshape(shape) for seed in seeds])
        z_hat = self.hyper_encoder.decode(grids.to(device), *shape[1:]).float()
        start, starts = noise.alpha.numel() - 1, x_t.to(device).split(1)
        walks = [dial(solvers.solve(x, start, num_inference_steps, noise, self.scheduler), realism, noise) for x in starts]
        return torch.cat(self.run(walks, texts, guidance_scale, watch, extra_channels=z_hat))

    @property
    def family(self) -> StableDiffusion:
        """Stable Diffusion's, but that the UNet sees more channels."""
        return StableDiffusion(self)

    def fingerprint(self, fused: bool = False) -> bytes:
        """Four bytes that tell this model from others, its codebook's probability model and its tokenizer's vocabulary included."""
        config = {"law": self.hyper_encoder.probability_model().identity(), "vocabulary": vocabulary_of(self.tokenizer).identity}
        return super().fingerprint({"hyper_encoder": self.hyper_encoder}, config, fused)
