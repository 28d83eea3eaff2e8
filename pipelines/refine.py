"""Refine: the file of a codec of today, which everyone can read, and a diffusion model that paints what it lost.

Two stages without common randomness, as HFD (Hoogeboom et al. 2023) and DIRAC (Ghouse et al. 2023). Without training:

    picture --JPEG, WebP, AVIF ...--> base file --(bits)--> base, the preview
        --VAE--> y = x_0 + error, taken for x_t / alpha_t at the matching t  --(probability-flow ODE)--> x_0 --VAE--> picture

The file holds the base file whole, and the error of each channel of its latent. What the base says holds in the end too: of a JPEG the
quantization cells of its coefficients, of others the low frequencies. A model can be trained for this: `codecs.refine.trained`.
"""

import os
from dataclasses import replace
from typing import Self, Unpack

from diffusers import DiffusionPipeline
from diffusers.image_processor import PipelineImageInput
from torch import Tensor
from torch.nn import Module

from diffusers_compress import images, loading
from diffusers_compress.arguments import check_choice, check_output_type, check_walk, prompts_of
from diffusers_compress.codecs.refine import bases, trained
from diffusers_compress.codecs.refine.format import MAX_PROMPT_BYTES, MAX_SEED, Parameters, code_of, read_file
from diffusers_compress.codecs.refine.paint import Job, Settings, estimated_job, job_of, paint
from diffusers_compress.contract import REFINE
from diffusers_compress.diffusion.families.common import scale_factor_of
from diffusers_compress.diffusion.families.components import Autoencoder, Scheduler, TextEncoder, Tokenizer, Transformer, UNet
from diffusers_compress.diffusion.families.stable_diffusion import StableDiffusion
from diffusers_compress.diffusion.realism import blend
from diffusers_compress.fingerprint import checksum
from diffusers_compress.format import container
from diffusers_compress.format.limits import Limits
from diffusers_compress.images import formats
from diffusers_compress.latent_pipeline import FAMILY_COMPONENTS, LatentCodecMixin
from diffusers_compress.models import adapter
from diffusers_compress.models.base_estimator import BaseEstimator
from diffusers_compress.models.wiener_unet import WienerUNet
from diffusers_compress.outputs import CompressOutput, DecompressOutput
from diffusers_compress.pipeline import Decoding, Goal, Watch, compressed, groups_of, undisturbed
from diffusers_compress.quality import smallest


class RefinePipeline(LatentCodecMixin, DiffusionPipeline):
    """Image codec from a pretrained diffusion model (see `families`) on top of a codec of today.

    `from_pretrained` takes such a model's folder or Hub id as it is. `compress` gives whole files as bytes, `decompress` gives pictures,
    calling the pipeline does both; `refine` takes files that some other program wrote.

    Args:
        scheduler: gives the noise levels. The probability-flow ODE is solved by DDIM steps, whatever the scheduler's class.
        vae, ..., transformer, force_zeros_for_empty_prompt: as in diffusers' own pipeline of the family, which may lack some.
        estimator: of a model that was trained to refine, what sees the base first.
        form: of such a model "flow" or "diffusion", see `codecs.refine.trained`; None for a model as it was published.

    Examples:
        >>> from PIL import Image
        >>> from diffusers_compress import RefinePipeline, embedded_model
        >>> pipe = RefinePipeline.from_pretrained(embedded_model())
        >>> image = Image.linear_gradient("L").convert("RGB")
        >>> both = pipe(image, max_bytes=2000, base="webp")
        >>> len(both.bitstreams[0]) <= 2000, both.images[0].size
        (True, (256, 256))
    """

    _optional_components = [*FAMILY_COMPONENTS, "estimator"]
    _refined = None, []  # key of the last call, and its jobs' means and samples

    def __init__(
        self,
        scheduler: Scheduler,
        vae: Autoencoder | None = None,
        text_encoder: TextEncoder | None = None,
        tokenizer: Tokenizer | None = None,
        unet: UNet | None = None,
        text_encoder_2: TextEncoder | None = None,
        tokenizer_2: Tokenizer | None = None,
        text_encoder_3: TextEncoder | None = None,
        tokenizer_3: Tokenizer | None = None,
        transformer: Transformer | None = None,
        force_zeros_for_empty_prompt: bool | None = None,
        estimator: BaseEstimator | None = None,
        form: str | None = None,
    ):
        super().__init__()
        self.register_modules(vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler)
        self.register_modules(text_encoder_2=text_encoder_2, tokenizer_2=tokenizer_2, transformer=transformer)
        self.register_modules(text_encoder_3=text_encoder_3, tokenizer_3=tokenizer_3, estimator=estimator)
        self.register_to_config(force_zeros_for_empty_prompt=force_zeros_for_empty_prompt, form=form)
        self.vae_scale_factor = scale_factor_of(vae)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **options) -> Self:
        """As diffusers', and takes an adapter too, as `examples/train_refine.py` writes it: what was trained over a Stable-Diffusion model."""
        options = loading.with_dtypes(options)
        folder = adapter.find(pretrained_model_name_or_path, **options)
        if folder is None:
            return super().from_pretrained(pretrained_model_name_or_path, **options)
        options.pop("revision", None)  # the adapter's, not its base's
        parts = trained.parts_of(folder, adapter.dtype_of(options, "estimator"))
        pipe = super().from_pretrained(adapter.base_of(folder), **adapter.with_float32(options, "unet"), **parts)
        if isinstance(pipe.unet, WienerUNet):
            pipe.unet.centre_on_estimate(scaled=True)
        adapter.apply(pipe.unet, folder, adapter.dtype_of(options, "unet"))
        return pipe

    # ------------------------------------------------------------------------------------------------------ public calls

    def compress(
        self,
        image: PipelineImageInput,
        fidelity: float | None = None,
        prompt: str | list[str] = "",
        base: str = "jpeg",
        seed: int = 0,
        batch_size: int = 8,
        **rate: Unpack[Goal],
    ) -> CompressOutput:
        """Pictures to files.

        Args:
            image: one or a list, of any sizes: PIL pictures, numpy arrays [H, W, C] or tensors [C, H, W] (see `images.to_tensor`).
            fidelity: in (0, 1]; the place on the base codec's own scale of qualities.
            prompt: one for all or one for each picture; stored in the file.
            base: "jpeg", "webp", "avif", "jxl" or "jpeg2000"; of an untrained model also "diffc" or "relic", whose file another pipeline reads.
            seed: of the noise that a decoder adds, 0 to 2**32 - 1; stored in the file.
            batch_size: pictures of like size that go through the autoencoder together at most.
            rate: `target_bpp`, `max_bytes`, `target_psnr` or `target_metric`, if not `fidelity`; see `contract.ImageCodec.compress`.

        Raises:
            ValueError: for an argument out of its range, or a size that even the smallest file exceeds.
        """
        check_choice("base", base, bases.NAMES)
        if seed not in range(MAX_SEED + 1):
            raise ValueError(f"seed must be a whole number from 0 to {MAX_SEED}, not {seed}")
        pictures, wanted = self.read_goal(REFINE, image, fidelity, **rate)
        prompts = prompts_of(prompt, len(pictures), MAX_PROMPT_BYTES)
        codec = bases.learned(self, base)

        files = [b""] * len(pictures)
        with self.labelled_bar("pictures", len(pictures)) as bar:
            for group, x_0 in self.encode_groups(pictures, batch_size):
                for i, x in zip(group, x_0):
                    parameters = Parameters(base, [0] * len(x), seed, prompts[i])

                    def coded(fidelity, i=i, x=x, parameters=parameters):
                        header, samples, limit, _ = pictures[i]
                        overhead = container.overhead(replace(header, parameters=parameters.to_bytes()))
                        data = bases.encoded(base, codec, samples, fidelity, limit, overhead)
                        y = self.encode_picture(self.pad(bases.decoded(base, codec, data))[None])[0]
                        parameters.errors = [code_of(error) for error in (y - x).square().mean((1, 2)).sqrt().tolist()]
                        return container.pack(replace(header, parameters=parameters.to_bytes()), data)

                    if wanted is not None:
                        files[i] = smallest(wanted, coded, self, pictures[i].x)
                    else:
                        files[i] = coded(fidelity)
                    bar.update()
        return compressed(files, pictures)

    def decompress(
        self,
        bitstreams: bytes | list[bytes],
        preview: bool = False,
        realism: float = 1.0,
        num_inference_steps: int = 8,
        guidance_scale: float = 1.0,
        projection_interval: int = 2,
        tile: int = 1024,
        late_start: float | None = None,
        **shared: Unpack[Decoding],
    ) -> DecompressOutput:
        """Files to pictures of their original sizes.

        Args:
            bitstreams: one file or a list.
            realism: in [0, 1], see `diffusion.realism`: between the best estimate, which is the base (of a JPEG: what one network call makes
                of it within its cells), and the refined picture. Both are kept, so that the same files at another realism come at once.
            num_inference_steps: network calls for each tile.
            guidance_scale: above 1, guidance towards the file's prompt.
            preview: the base as its own decoder gives it, without any network; of a base of "diffc" or "relic", that codec's preview.
            projection_interval: of a JPEG, calls of an untrained model between projections onto the cells, each thrice the autoencoder.
            tile: pictures with a longer side are refined in overlapping tiles of this side, a multiple of 64 from 128 on.
            late_start: of a trained model, the noise to start from over the deviation of what the base leaves open; default: by its form.
            shared: `limits`, `batch_size` and others that every codec takes, see `contract.ImageCodec.decompress`.

        Raises:
            BitstreamError: `NotABitstream`, `UnsupportedVersion`, `Corrupt`, `WrongModel`, `LimitExceeded`.
            ValueError: for an argument out of its range.
        """
        settings = Settings(num_inference_steps, guidance_scale, projection_interval, tile, late_start)
        check_walk(num_inference_steps, realism)
        files = self.read_files(read_file, bitstreams, **shared)
        if preview:
            pictures = [bases.picture(self, *file) for file in files.contents]
        else:
            jobs = [job_of(self, *file) for file in files.contents]
            pictures = self.refined(jobs, realism, settings, files.batch_size, files.watch)
        return DecompressOutput(images=[images.to_output(x[None], files.output_type)[0] for x in pictures], notes=files.notes)

    @undisturbed
    def refine(
        self,
        files: bytes | list[bytes],
        realism: float = 1.0,
        prompt: str = "",
        seed: int = 0,
        num_inference_steps: int = 8,
        guidance_scale: float = 1.0,
        projection_interval: int = 2,
        tile: int = 1024,
        late_start: float | None = None,
        output_type: str = "pil",
        batch_size: int = 8,
    ) -> DecompressOutput:
        """Pictures from JPEG, WebP, AVIF, JPEG XL and JPEG 2000 files that some other program wrote, upright and in sRGB.

        How much they lost is estimated (`blind`): of a JPEG from its quantization tables and coefficients, of others from their size.
        The arguments are those of `compress` and `decompress`. ValueError for animations, broken files and other formats.
        """
        settings = Settings(num_inference_steps, guidance_scale, projection_interval, tile, late_start)
        check_walk(num_inference_steps, realism)
        check_output_type(output_type)
        files = [files] if isinstance(files, (bytes, bytearray)) else files
        opened = [formats.opened(formats.kind_of(data), data) for data in files]
        jobs = [estimated_job(self, picture, data, seed, prompt) for picture, data in zip(opened, files)]
        pictures = self.refined(jobs, realism, settings, batch_size)
        upright, notes = zip(*(formats.upright(x, picture) for x, picture in zip(pictures, opened)))
        return DecompressOutput(images=[images.to_output(x[None], output_type)[0] for x in upright], notes=list(notes))

    # ------------------------------------------------------------------------------------------------------------ steps

    @property
    def family(self) -> StableDiffusion:
        """A trained UNet sees more channels than its family's, which is Stable Diffusion's."""
        return StableDiffusion(self) if self.config.form else super().family

    def networks(self) -> dict[str, Module]:
        return super().networks() | ({} if self.estimator is None else {"estimator": self.estimator})

    def prediction(self, data: bytes, limits: Limits) -> Tensor | None:
        """The base; of a learned one, what its own codec takes."""
        header, parameters, base = read_file(data, limits)
        codec = bases.learned(self, parameters.base)
        return bases.picture(self, header, parameters, base) if codec is None else codec.prediction(base, limits)

    def refined(self, jobs: list[Job], realism: float, settings: Settings, batch_size: int, watch: Watch = None) -> list[Tensor]:
        """Pictures [3, H, W] in [-1, 1]; estimates and samples are those of the last call if it was the same."""
        if realism == 0 and not any(job.cells for job in jobs):
            return [job.base for job in jobs]
        about = [(hash(job.base.numpy().tobytes()), *job.errors.tolist(), job.seed, job.prompt) for job in jobs]
        key = checksum(self.networks()), self.fingerprint(), settings, about
        known, pairs = self._refined
        if known != key or watch is not None:
            pairs = [None] * len(jobs)
            for group in groups_of(batch_size, [self.latent_shape(*job.base.shape[-2:]) for job in jobs]):
                for i, pair in zip(group, paint(self, [jobs[i] for i in group], settings, watch)):
                    pairs[i] = pair
            self._refined = key, pairs
        return [blend(estimate, sample, realism) for estimate, sample in pairs]
