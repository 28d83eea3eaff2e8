"""Relic: the quantized latent of a diffusion model, entropy-coded, and denoised from the timestep whose noise it resembles.

Relic, Azevedo, Gross, Schroers: Lossy Image Compression with Foundation Diffusion Models (ECCV 2024); Relic et al.: Bridging the Gap
between Gaussian Diffusion Models and Universal Quantization for Image Compression (CVPR 2025). The sender calls no diffusion network:

    picture --VAE--> x_0 --step width D--> k --(bits)--> k --> y_hat = x_0 + error, taken for x_t / alpha_t
        at the t whose noise is as strong  --(probability-flow ODE, few calls)--> x_0 --VAE--> picture
"""

import math
from typing import Unpack

import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import PipelineImageInput
from torch import Tensor

from diffusers_compress import images
from diffusers_compress.arguments import check_choice, check_walk, prompts_of
from diffusers_compress.codecs.relic.format import MAX_PROMPT_BYTES, MODEL_NUMBERS, ROUNDINGS, Parameters, read_file, step_number
from diffusers_compress.codecs.relic.quantizer import Quantizer, levels_of
from diffusers_compress.codecs.relic.rate import RateSearch
from diffusers_compress.codecs.relic.symbols import EntropyModel
from diffusers_compress.coding.logistic import UNIT
from diffusers_compress.contract import RELIC
from diffusers_compress.diffusion import schedule
from diffusers_compress.diffusion.families.common import scale_factor_of
from diffusers_compress.diffusion.families.components import Autoencoder, Scheduler, TextEncoder, Tokenizer, Transformer, UNet
from diffusers_compress.diffusion.finishers import Source, calls_of, finisher_of
from diffusers_compress.errors import Corrupt, WrongModel
from diffusers_compress.format.limits import Limits
from diffusers_compress.importance import Importance
from diffusers_compress.latent_pipeline import FAMILY_COMPONENTS, LatentCodecMixin
from diffusers_compress.models.hyperprior import HyperPrior, ParameterNetwork
from diffusers_compress.outputs import CompressOutput, DecompressOutput
from diffusers_compress.pipeline import Decoding, Goal, compressed, groups_of
from diffusers_compress.quality import smallest

CALLS = 5  # of the network, in decoding
AFFINE_SHARE = 32  # a file must be so many times as large as its scales and shifts, 12 bits a channel, to have them


class RelicPipeline(LatentCodecMixin, DiffusionPipeline):
    """Image codec from a pretrained diffusion model (see `families`) that encodes without calling its network.

    `from_pretrained` takes such a model's folder or Hub id as it is. `compress` gives whole files as bytes, `decompress`
    gives pictures, calling the pipeline does both.

    Args:
        scheduler: gives the noise levels; it must solve the probability-flow ODE, by which `decompress` finishes the picture.
        vae, ..., transformer, force_zeros_for_empty_prompt: as in diffusers' own pipeline of the family, which may lack some.
        hyperprior: a trained entropy model. Without one the adaptive model is used.
        parameter_network: chooses step widths, shifts and the timestep of dithered files. Without one they follow from the step width alone.
        calibration: what was measured of the model; key "latent" holds `calibration.latent_statistics`.

    Examples:
        >>> from PIL import Image
        >>> from diffusers_compress import RelicPipeline, embedded_model
        >>> pipe = RelicPipeline.from_pretrained(embedded_model())
        >>> image = Image.linear_gradient("L").convert("RGB")
        >>> both = pipe(image, max_bytes=100)
        >>> len(both.bitstreams[0]) <= 100, both.images[0].size
        (True, (256, 256))
    """

    _optional_components = [*FAMILY_COMPONENTS, "hyperprior", "parameter_network"]

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
        hyperprior: HyperPrior | None = None,
        parameter_network: ParameterNetwork | None = None,
        force_zeros_for_empty_prompt: bool | None = None,
        calibration: dict | None = None,
    ):
        super().__init__()
        self.register_modules(vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler)
        self.register_modules(text_encoder_2=text_encoder_2, tokenizer_2=tokenizer_2, transformer=transformer)
        self.register_modules(text_encoder_3=text_encoder_3, tokenizer_3=tokenizer_3)
        self.register_modules(hyperprior=hyperprior, parameter_network=parameter_network)
        self.register_to_config(force_zeros_for_empty_prompt=force_zeros_for_empty_prompt, calibration=calibration)
        self.vae_scale_factor = scale_factor_of(vae)

    # ------------------------------------------------------------------------------------------------------ public calls

    def compress(
        self,
        image: PipelineImageInput,
        fidelity: float | None = None,
        prompt: str | list[str] = "",
        rounding: str = "plain",
        entropy_model: str | None = None,
        importance: Importance = None,
        batch_size: int = 8,
        **rate: Unpack[Goal],
    ) -> CompressOutput:
        """Pictures to files. The diffusion network is not called.

        Args:
            image: one or a list, of any sizes: PIL pictures, numpy arrays [H, W, C] or tensors [C, H, W] (see `images.to_tensor`).
            fidelity: in (0, 1]; the step width is that whose dithered noise belongs to the timestep (1 - fidelity) (T - 1).
            prompt: one for all or one for each picture; stored in the file.
            rounding: "plain", or "dithered" (universal quantization: the error is noise, whatever the picture, and takes more bits).
            entropy_model: "hyperprior" or "adaptive"; default: the hyperprior if the pipeline has one.
            importance: where the bits go, a mask, boxes or what finds them, see `importance.maps_of`. The background has steps 4 times as
                wide; the file holds a coarse map. With plain rounding only.
            batch_size: pictures of like size that go through the autoencoder together at most.
            rate: `target_bpp`, `max_bytes`, `target_psnr` or `target_metric`, if not `fidelity`; see `contract.ImageCodec.compress`.

        Raises:
            ValueError: for an argument out of its range, or a size that even the coarsest file exceeds.
        """
        check_choice("rounding", rounding, ROUNDINGS)
        if importance is not None and rounding != "plain":
            raise ValueError(
                "importance needs plain rounding: with dither the noise is to be of one strength in all of the picture"
            )
        model, noise = self.entropy_model(entropy_model), self.noise_schedule()
        pictures, wanted = self.read_goal(RELIC, image, fidelity, **rate)
        prompts = prompts_of(prompt, len(pictures), MAX_PROMPT_BYTES)
        maps = [[] if own is None else levels_of(own) for own in self.importance_of(importance, pictures)]

        files = [b""] * len(pictures)
        with self.labelled_bar("pictures", len(pictures)) as bar:
            for group, x_0 in self.encode_groups(pictures, batch_size):
                for i, x in zip(group, x_0.cpu()):
                    size = pictures[i].max_bytes
                    network = self.parameter_network if size >= AFFINE_SHARE * 12 * len(x) / 8 else None
                    parameters = Parameters(
                        model.number, rounding == "dithered", 0, 0, model.tables, None, levels=maps[i], prompt=prompts[i]
                    )
                    search = RateSearch(x, pictures[i].header, parameters, noise, model, self.statistics(), network)

                    def coded(fidelity, search=search):
                        width = math.sqrt(12) / float(noise.ratio[noise.timestep_of(fidelity)])  # D^2 / 12 = sigma^2 / alpha^2
                        return search.data(step_number(width))

                    if wanted is not None:
                        files[i] = smallest(wanted, coded, self, pictures[i].x)
                    else:
                        files[i] = search.within(size) if fidelity is None else coded(fidelity)
                    bar.update()
        return compressed(files, pictures)

    def decompress(
        self,
        bitstreams: bytes | list[bytes],
        realism: float = 1.0,
        preview: bool = False,
        num_inference_steps: int | None = None,
        guidance_scale: float = 1.0,
        finisher: Source = None,
        **shared: Unpack[Decoding],
    ) -> DecompressOutput:
        """Files to pictures of their original sizes.

        Args:
            bitstreams: one file or a list.
            realism: in [0, 1], between the least squared error (0: a network call or two) and the most natural look, see `diffusion.realism`.
            preview: what the entropy model expects, without a call of the network.
            num_inference_steps: network calls; default: 5, or 1 with a finisher.
            guidance_scale: above 1, guidance towards the file's prompt.
            finisher: a student in few calls, in place of the flow, see `diffusion.finishers.load`; or a pipeline that has one.
            shared: `limits`, `batch_size` and others that every codec takes, see `contract.ImageCodec.decompress`. The
                entropy model must be the file's own.

        Raises:
            BitstreamError: `NotABitstream`, `UnsupportedVersion`, `Corrupt`, `WrongModel`, `LimitExceeded`.
            ValueError: for an argument out of its range.
        """
        check_walk(num_inference_steps, realism)
        if preview and finisher is not None:
            raise ValueError("give preview or finisher, not both")
        student, noise = finisher_of(self, finisher), self.noise_schedule()
        steps = calls_of(num_inference_steps, CALLS, student)
        files = self.read_files(read_file, bitstreams, **shared)

        pictures = [None] * len(files.contents)
        shapes = [self.latent_shape(header.height, header.width) for header, *_ in files.contents]
        for group in groups_of(files.batch_size, shapes):
            headers, parameters, payloads = zip(*[files.contents[i] for i in group])
            read = [self.read_latent(*file, shapes[group[0]], noise) for file in zip(parameters, payloads)]
            y_hat, expected = (torch.stack(column).float().to(self._execution_device) for column in zip(*read))
            x_0 = expected
            if not preview:
                ends = [(noise.level(own.timestep)[0] * y, own.timestep) for y, own in zip(y_hat.split(1), parameters)]
                prompts = [own.prompt for own in parameters]
                x_0 = self.finish(ends, prompts, steps, realism, guidance_scale, files.watch, student)
            x = self.decode_latent(x_0)
            for i, picture in zip(group, self.pictures_of(x, headers, files.output_type)):
                pictures[i] = picture
        return DecompressOutput(images=pictures, notes=files.notes)

    # ------------------------------------------------------------------------------------------------------------ steps

    def statistics(self) -> dict:
        """Mean and standard deviation of each channel: calibrated, or those of a unit Gaussian."""
        channels = self.family.channels
        return (self.config.calibration or {}).get("latent") or {"mean": [0.0] * channels, "std": [1.0] * channels}

    def entropy_model(self, name: str | None = None) -> EntropyModel:
        """The `EntropyModel` of this name. ValueError if the pipeline has none."""
        name = name or ("hyperprior" if self.hyperprior is not None else "adaptive")
        if name not in MODEL_NUMBERS or name == "hyperprior" and self.hyperprior is None:
            known = [known for known in MODEL_NUMBERS if known == "adaptive" or self.hyperprior is not None]
            raise ValueError(f"entropy_model must be one of {known} for this pipeline, not {name!r}")
        return EntropyModel(self.statistics(), self.hyperprior if name == "hyperprior" else None)

    def prediction(self, data: bytes, limits: Limits) -> Tensor | None:
        """The preview, whose latent the symbols alone decide."""
        header, parameters, payload = read_file(data, limits)
        _, expected = self.read_latent(parameters, payload, self.latent_shape(header.height, header.width), self.noise_schedule())
        x = self.decode_in_float64(expected)
        return None if x is None else images.crop(x, header.height, header.width)

    def read_latent(
        self, parameters: Parameters, payload: bytes, shape: tuple[int, int, int], noise: schedule.NoiseSchedule
    ) -> tuple[Tensor, Tensor]:
        """y_hat and what the entropy model expects of it, [C, h, w] each, float64."""
        name = next(name for name, number in MODEL_NUMBERS.items() if number == parameters.model)
        if name == "hyperprior" and self.hyperprior is None:
            raise WrongModel(
                f"the file needs a hyperprior ({parameters.tables:04x}), this pipeline has none; load the folder that it was made with"
            )
        model = self.entropy_model(name)
        if model.tables != parameters.tables:
            raise WrongModel(f"the file was made with the entropy model {parameters.tables:04x}, this is {model.tables:04x}")
        if parameters.timestep >= noise.alpha.numel():
            raise Corrupt(f"the file names timestep {parameters.timestep}, the model has {noise.alpha.numel()}")
        quantizer = Quantizer(parameters, self.statistics(), shape)
        receiver = model.receive(quantizer, payload)
        expected = quantizer.mean + quantizer.steps * receiver.expected / UNIT
        return quantizer.latent(receiver.v), torch.from_numpy(expected).reshape(shape)
