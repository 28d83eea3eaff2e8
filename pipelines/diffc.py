"""DiffC: a pretrained latent diffusion model as an image codec, without training.

Theis, Salimans, Hoffman, Mentzer: Lossy Compression with Gaussian Diffusion (2022); Vonderfecht, Liu: Lossy Compression with
Pretrained Diffusion Models (ICLR 2025). The noisy latent itself is sent, one reverse step after another: both sides predict x_0
from x_t, the sender moves the shared noise of the step towards its own x_0 by a channel code, and both hold the same x_s.

    x_T --(bits)--> x_t1 --(bits)--> x_t2 ... --(bits)--> x_end --(probability-flow ODE, no bits)--> x_0 --VAE--> picture

All steps have the same budget of bits; the sender chooses how far down the noise each of them goes. Few big steps do, because both
sides know how large the denoiser's error is at each frequency (`reference`).
"""

import math
from collections.abc import Callable
from types import ModuleType

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderTiny,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput
from diffusers.schedulers import KarrasDiffusionSchedulers
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from diffusers_compress import images
from diffusers_compress.codecs.diffc import drift, reference
from diffusers_compress.codecs.diffc.format import (
    BUDGET_DIGITS,
    CHANNEL_NUMBERS,
    MAX_PROMPT_BYTES,
    MAX_STEPS,
    Parameters,
    nearest,
    read_file,
)
from diffusers_compress.codecs.diffc.loop import Receiver, Sender, drift_of, reverse
from diffusers_compress.codecs.diffc.rate import MIN_BUDGET, budget_to_fill, overhead
from diffusers_compress.coding import randomness
from diffusers_compress.coding.channels import CHANNELS
from diffusers_compress.coding.channels.trellis import Trellis
from diffusers_compress.contract import DIFFC
from diffusers_compress.diffusion import schedule, solvers
from diffusers_compress.diffusion.families.common import scale_factor_of
from diffusers_compress.diffusion.schedule import NoiseSchedule
from diffusers_compress.format.container import Header
from diffusers_compress.format.limits import DEFAULT_LIMITS, Limits
from diffusers_compress.models.variance_head import VarianceHead
from diffusers_compress.outputs import CompressOutput, DecompressOutput
from diffusers_compress.pipeline import (
    FAMILY_COMPONENTS,
    LatentCodecMixin,
    check_output,
    check_rate_and_prompts,
    groups_of,
    undisturbed,
    watched,
)

RECONSTRUCTIONS = ("flow", "ancestral", "denoised")
CHECKED_BYTES = 2000  # files from this size on carry the two bytes of `drift`


class DiffCPipeline(LatentCodecMixin, DiffusionPipeline):
    """Image codec from a pretrained diffusion model: Stable Diffusion, SDXL, FLUX.1 and others, see `families`.

    `from_pretrained` takes such a model's folder or Hub id as it is. `compress` gives whole files as bytes, `decompress`
    gives pictures, calling the pipeline does both. A file that was cut short decodes to a coarser picture.

    Args:
        scheduler: gives the noise levels, and finishes the picture in `decompress` if it solves the probability-flow ODE.
        vae, ..., transformer, force_zeros_for_empty_prompt: as in diffusers' own pipeline of the family, which may lack some.
        variance_head: `VarianceHead` trained for this model, which makes files smaller; optional.
        calibration: what `diffusers-compress calibrate` found for this model, which makes files smaller; optional.

    Examples:
        >>> from PIL import Image
        >>> from diffusers_compress import DiffCPipeline, embedded_model
        >>> pipe = DiffCPipeline.from_pretrained(embedded_model())
        >>> image = Image.linear_gradient("L").convert("RGB")
        >>> both = pipe(image, max_bytes=100)
        >>> len(both.bitstreams[0]) <= 100, both.images[0].size
        (True, (256, 256))
    """

    _optional_components = [*FAMILY_COMPONENTS, "variance_head"]

    def __init__(
        self,
        scheduler: KarrasDiffusionSchedulers | FlowMatchEulerDiscreteScheduler,
        vae: AutoencoderKL | AutoencoderDC | AutoencoderTiny | None = None,
        text_encoder: CLIPTextModel | CLIPTextModelWithProjection | None = None,
        tokenizer: CLIPTokenizer | None = None,
        unet: UNet2DConditionModel | UNet2DModel | None = None,
        text_encoder_2: CLIPTextModelWithProjection | T5EncoderModel | None = None,
        tokenizer_2: CLIPTokenizer | T5TokenizerFast | None = None,
        text_encoder_3: T5EncoderModel | None = None,
        tokenizer_3: T5TokenizerFast | None = None,
        transformer: SD3Transformer2DModel | FluxTransformer2DModel | None = None,
        variance_head: VarianceHead | None = None,
        force_zeros_for_empty_prompt: bool | None = None,
        calibration: dict | None = None,
    ):
        super().__init__()
        self.register_modules(vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler)
        self.register_modules(text_encoder_2=text_encoder_2, tokenizer_2=tokenizer_2, transformer=transformer)
        self.register_modules(text_encoder_3=text_encoder_3, tokenizer_3=tokenizer_3)
        self.register_modules(variance_head=variance_head)
        self.register_to_config(force_zeros_for_empty_prompt=force_zeros_for_empty_prompt, calibration=calibration)
        self.vae_scale_factor = scale_factor_of(vae)

    # ------------------------------------------------------------------------------------------------------ public calls

    @undisturbed
    @watched
    def compress(
        self,
        image: PipelineImageInput,
        target_bpp: float | None = None,
        max_bytes: int | None = None,
        fidelity: float | None = None,
        prompt: str | list[str] = "",
        num_coding_steps: int = 12,
        coder: str = "trellis",
        batch_size: int = 8,
        callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
    ) -> CompressOutput:
        """Pictures to files.

        Args:
            image: a PIL picture, numpy array [H, W, C] or tensor [C, H, W] (see `images.to_tensor`), or a list of them, any sizes.
            target_bpp: bits per pixel that no file exceeds, 8 * bytes / (width * height).
            max_bytes: size in bytes that no file exceeds.
            fidelity: in (0, 1]; the stream ends at about the timestep (1 - fidelity) (T - 1), not below it. Exactly one of these three.
            prompt: one for all or one for each picture; stored in the file.
            num_coding_steps: coded steps, 1 to 256, each a network call but the first, unless the model was trained on pure noise. Of a
                file so small that a step would have less than 64 bits there are fewer; with `fidelity` it is the number for an average
                picture.
            coder: "trellis"; "trellis32", for files 3 to 4 % smaller, whose search takes a CPU about a second a step, more from some
                2,000 bits a step on; or "poisson", the published coder.
            batch_size: pictures of like size that go through the network together at most.
            callback_on_step_end: called after each network call with the pipeline, the number of the step, its noisiest timestep and a
                dictionary of the tensors named in `callback_on_step_end_tensor_inputs`: "latents", x_t, and "noise_pred", the network's
                output. It looks on: what it returns counts for nothing, since both ends must hold the same x_t.

        Raises:
            ValueError: for an argument out of its range, or a size that even an empty file exceeds.
        """
        pictures = images.as_list(image)
        prompts = [prompt] * len(pictures) if isinstance(prompt, str) else list(prompt)
        check_compress_arguments(target_bpp, max_bytes, fidelity, num_coding_steps, coder, prompts, pictures)
        noise = schedule.from_pure_noise(self.noise_schedule())
        tensors, notes = zip(*map(images.to_tensor, pictures))
        identity = self.fingerprint()
        stop_t = 0 if fidelity is None else round((1 - fidelity) * (noise.alpha.numel() - 1))

        files = [b""] * len(pictures)
        for group in groups_of(batch_size, [self.latent_shape(*x.shape[-2:]) for x in tensors]):
            x_0 = self.encode_picture(torch.stack([self.pad(tensors[i]) for i in group]))
            senders = []
            for i, x in zip(group, x_0.split(1)):
                height, width = tensors[i].shape[-2:]
                header = Header(DIFFC, width, height, identity, b"")
                parameters = Parameters(CHANNEL_NUMBERS[coder], 0, prompt=prompts[i])
                if fidelity is None:
                    limit, steps = max_bytes or width * height * target_bpp / 8, num_coding_steps
                    parameters.check = 0 if limit >= CHECKED_BYTES else None
                    smallest = overhead(header, parameters)
                    if smallest > limit:
                        raise ValueError(
                            f"a {width}x{height} picture may take {int(limit)} bytes here; the smallest file has {smallest}"
                        )
                    parameters.budget = budget_to_fill(header, parameters, steps, limit)
                else:
                    limit, steps = math.inf, MAX_STEPS
                    bits = reference.expected_bits(self.error_calibration(), x.shape[1:], float(noise.snr[stop_t]))
                    parameters.check = 0 if bits >= 8 * CHECKED_BYTES else None
                    budget = max(MIN_BUDGET, CHANNELS[parameters.channel].budget(bits / num_coding_steps))
                    parameters.budget = nearest(budget, BUDGET_DIGITS)
                senders.append(Sender(noise, x, header, parameters, stop_t, steps, limit))
            ends = self.reverse(noise, CHANNELS[CHANNEL_NUMBERS[coder]], senders, x_0.shape[1:], [prompts[i] for i in group])
            for i, sender, (x_t, _) in zip(group, senders, ends):
                sender.end_at(x_t)
                files[i] = sender.file()
        self.maybe_free_model_hooks()
        bpp = [8 * len(file) / (x.shape[-1] * x.shape[-2]) for file, x in zip(files, tensors)]
        return CompressOutput(bitstreams=files, bpp=bpp, notes=list(notes))

    @undisturbed
    @watched
    def decompress(
        self,
        bitstreams: bytes | list[bytes],
        reconstruction: str = "flow",
        num_inference_steps: int = 10,
        guidance_scale: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        allow_other_model: bool = False,
        limits: Limits = DEFAULT_LIMITS,
        batch_size: int = 8,
        callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
    ) -> DecompressOutput:
        """Files to pictures of their original sizes.

        Args:
            bitstreams: one file or a list. A file cut after its header gives the picture of the whole steps that are left.
            reconstruction: from the last noise level on, "flow" (probability-flow ODE), "ancestral" (random draws from
                `generator`, one for all or a list), or "denoised" (the network's mean in one call: a preview).
            num_inference_steps: network calls of "flow" and "ancestral".
            guidance_scale: above 1, guidance towards the file's prompt, in the reconstruction alone.
            output_type: "pil", "np" or "pt".
            allow_other_model: decode although the file was made with other weights.
            limits: sizes that a file may claim.
            batch_size, callback_on_step_end, callback_on_step_end_tensor_inputs: as in `compress`.

        Warns:
            RuntimeWarning: if the latent at the end of a file's stream differs from the sender's, as `drift` in the result tells.

        Raises:
            BitstreamError: `NotABitstream`, `UnsupportedVersion`, `Corrupt`, `WrongModel`, `LimitExceeded`.
            ValueError: for an argument out of its range.
        """
        check_decompress_arguments(reconstruction, num_inference_steps, output_type)
        files = [read_file(data, limits) for data in ([bitstreams] if isinstance(bitstreams, (bytes, bytearray)) else bitstreams)]
        if files and isinstance(generator, list) and len(generator) != len(files):
            raise ValueError(f"{len(generator)} generators were given for {len(files)} files")
        notes = self.check_model([header for header, *_ in files], allow_other_model)
        noise = self.noise_schedule()
        coded = schedule.from_pure_noise(noise)

        pictures, drifts = [None] * len(files), [None] * len(files)
        shapes = [(self.latent_shape(header.height, header.width), parameters.channel) for header, parameters, *_ in files]
        for group in groups_of(batch_size, shapes):
            prompts = [files[i][1].prompt for i in group]
            shape, channel = shapes[group[0]]
            ends = self.reverse(coded, CHANNELS[channel], [Receiver(coded, *files[i][1:3]) for i in group], shape, prompts)
            for i, (x_t, _) in zip(group, ends):
                drifts[i] = drift_of(x_t, *files[i][1:3])
            if reconstruction == "flow":
                walks = [solvers.solve(x_t, t, num_inference_steps, noise, self.scheduler) for x_t, t in ends]
            else:
                calls = num_inference_steps if reconstruction == "ancestral" else 1
                draws = generator if isinstance(generator, list) else [generator] * len(files)
                walks = [solvers.ancestral(x_t, t, calls, noise, draws[i]) for i, (x_t, t) in zip(group, ends)]
            x_0 = torch.cat(self.run(walks, prompts, guidance_scale))
            for i, x in zip(group, self.decode_latent(x_0)):
                header = files[i][0]
                pictures[i] = images.to_output(images.crop(x, header.height, header.width)[None], output_type)[0]
        self.maybe_free_model_hooks()
        for own, (_, parameters, messages, complete), found in zip(notes, files, drifts):
            if not complete:
                steps = len(parameters.budgets)
                own.append(f"the file was cut short; the picture is made of {len(messages)} of its {steps} steps")
            own += drift.notes(found)
        return DecompressOutput(images=pictures, notes=notes, drift=drifts)

    # ------------------------------------------------------------------------------------------------------------ steps

    def start(self, shape: tuple[int, int, int], batch: int) -> Tensor:
        """Shared noise that stands for x_T ~ N(0, I), the same for all pictures [batch, C, h, w]."""
        noise = randomness.normals(math.prod(shape), randomness.START, device=self._execution_device)
        return noise.view(1, *shape).repeat(batch, 1, 1, 1)

    def reverse(
        self, noise: NoiseSchedule, channel: Trellis | ModuleType, ends: list, shape: tuple[int, int, int], prompts: list[str]
    ) -> list[tuple[Tensor, int]]:
        """The coding loop with this model: x_t [1, C, h, w] and t of each picture where its stream ends."""
        x_t = self.start(shape, len(ends))

        def error_variance(x_t, x_0_hat, timesteps):
            return self.error_variance(noise, x_t, x_0_hat, timesteps)

        return self.with_network(lambda network: reverse(noise, channel, x_t, ends, network, error_variance), prompts)

    def error_variance(self, noise: NoiseSchedule, x_t: Tensor, x_0_hat: Tensor, timesteps: list[int]) -> tuple[Tensor, Tensor]:
        """Variance of the coefficients of x_0 - x_0_hat, up to a factor for each picture, and their rank: [B, C, h, w] each."""
        snr, shape = noise.snr[timesteps], x_t.shape[1:]
        variances = [reference.error_variance(self.error_calibration(), float(level), shape) for level in snr]
        # The ranks are made on the CPU: they decide which bits belong to which coefficient.
        variance, rank = (each.to(x_t.device) for each in (torch.stack(variances), reference.rank(torch.stack(variances))))
        if self.variance_head is not None and noise.knows(timesteps[0]):
            alpha, sigma = (level[timesteps].float().to(x_t.device)[:, None, None, None] for level in (noise.alpha, noise.sigma))
            variance = variance * self.variance_head(x_0_hat, (x_t - alpha * x_0_hat) / sigma, snr.to(x_t.device)).exp()
        return variance, rank

    def error_calibration(self) -> dict | None:
        return (self.config.calibration or {}).get("error")

    def fingerprint(self, with_head: bool = True, with_calibration: bool = True, fused: bool = False) -> bytes:
        """Four bytes that tell this model from others: what `LatentCodecMixin.fingerprint` says, the variance head, the calibration."""
        head = {"variance_head": self.variance_head} if with_head and self.variance_head is not None else {}
        return super().fingerprint(head, {"error": self.error_calibration() if with_calibration else None}, fused)

    def relatives(self) -> dict[bytes, str]:
        return {
            self.fingerprint(with_head=False): "before it had its variance head",
            self.fingerprint(with_calibration=False): "before it was calibrated",
            self.fingerprint(with_head=False, with_calibration=False): "as it is without variance head and calibration",
        }


def check_compress_arguments(target_bpp, max_bytes, fidelity, num_coding_steps, coder, prompts, pictures):
    check_rate_and_prompts(target_bpp, max_bytes, fidelity, prompts, pictures, MAX_PROMPT_BYTES)
    if not 1 <= num_coding_steps <= MAX_STEPS:
        raise ValueError(f"num_coding_steps must be from 1 to {MAX_STEPS}, not {num_coding_steps}")
    if coder not in CHANNEL_NUMBERS:
        raise ValueError(f"coder must be one of {sorted(CHANNEL_NUMBERS)}, not {coder!r}")


def check_decompress_arguments(reconstruction, num_inference_steps, output_type):
    if reconstruction not in RECONSTRUCTIONS:
        raise ValueError(f"reconstruction must be one of {list(RECONSTRUCTIONS)}, not {reconstruction!r}")
    check_output(num_inference_steps, output_type)
