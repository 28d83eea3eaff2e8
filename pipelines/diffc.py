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
from functools import partial
from typing import Unpack

import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import PipelineImageInput
from torch import Tensor

from diffusers_compress.arguments import check_choice, check_walk, generators_of, prompts_of
from diffusers_compress.codecs.diffc import drift, fitting, loop, reference, target, tuning
from diffusers_compress.codecs.diffc.ends import Channel, Receiver, Sender, drift_of
from diffusers_compress.codecs.diffc.finish import RECONSTRUCTIONS, Finish, finished
from diffusers_compress.codecs.diffc.format import MAX_PROMPT_BYTES, MAX_STEPS, Parameters, read_file
from diffusers_compress.codecs.diffc.rate import down_to, within
from diffusers_compress.coding import randomness
from diffusers_compress.coding.channels import CHANNELS, channel_of
from diffusers_compress.contract import DIFFC
from diffusers_compress.diffusion import schedule
from diffusers_compress.diffusion.families.common import scale_factor_of
from diffusers_compress.diffusion.families.components import Autoencoder, Scheduler, TextEncoder, Tokenizer, Transformer, UNet
from diffusers_compress.diffusion.finishers import Source, finisher_of
from diffusers_compress.diffusion.schedule import NoiseSchedule
from diffusers_compress.importance import Importance
from diffusers_compress.latent_pipeline import FAMILY_COMPONENTS, LatentCodecMixin
from diffusers_compress.models.variance_head import VarianceHead
from diffusers_compress.outputs import CompressOutput, DecompressOutput
from diffusers_compress.pipeline import Callback, Decoding, Goal, Watch, compressed, groups_of


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

    def compress(
        self,
        image: PipelineImageInput,
        fidelity: float | None = None,
        prompt: str | list[str] = "",
        num_coding_steps: int = 12,
        coder: str = "trellis32",
        importance: Importance = None,
        tune: str = "psnr",
        batch_size: int = 8,
        callback_on_step_end: Callback = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
        **rate: Unpack[Goal],
    ) -> CompressOutput:
        """Pictures to files.

        Args:
            image: one or a list, of any sizes: PIL pictures, numpy arrays [H, W, C] or tensors [C, H, W] (see `images.to_tensor`).
            fidelity: in (0, 1]; the stream ends at about the timestep (1 - fidelity) (T - 1), not below it.
            prompt: one for all or one for each picture; stored in the file.
            num_coding_steps: 1 to 256, each a network call (but the first, unless the model knows pure noise). A file so small that a
                step would have less than 64 bits has fewer; without a size it is the number for an average picture.
            coder: "trellis32"; "trellis", with which a CPU searches faster, for files 3 to 4 % larger; or "poisson", the published coder.
            importance: where the bits go, a mask, boxes or what finds them, see `importance.maps_of`. The background has no part in the
                second half of the file. Not with a target of quality.
            tune: "psnr", or "ms-ssim": latents fitted to it, fewer bits for fine detail and busy places, see `tuning`.
            batch_size: pictures of like size that go through the network together at most.
            callback_on_step_end, callback_on_step_end_tensor_inputs: as in `decompress`.
            rate: `target_bpp`, `max_bytes`, `target_psnr` or `target_metric`, if not `fidelity`; see `contract.ImageCodec.compress`.

        Raises:
            ValueError: for an argument out of its range, or a size that even an empty file exceeds.
        """
        check_choice("coder", coder, CHANNELS)
        check_choice("tune", tune, tuning.TUNES)
        if not 1 <= num_coding_steps <= MAX_STEPS:
            raise ValueError(f"num_coding_steps must be from 1 to {MAX_STEPS}, not {num_coding_steps}")
        watch = self.watch(callback_on_step_end, callback_on_step_end_tensor_inputs)
        pictures, wanted = self.read_goal(DIFFC, image, fidelity, **rate)
        prompts = prompts_of(prompt, len(pictures), MAX_PROMPT_BYTES)
        if wanted is not None and importance is not None:
            raise ValueError(
                f"importance leaves the background as it is, where {wanted.label} counts: give a rate or fidelity with it"
            )
        maps = self.importance_of(importance, pictures)
        noise, number = schedule.from_pure_noise(self.noise_schedule()), CHANNELS[coder].number

        files = [b""] * len(pictures)
        for group, x_0 in self.encode_groups(pictures, batch_size):
            padded = [self.pad(pictures[i].x) for i in group]
            x_0 = fitting.latents(self, tune, padded, x_0)
            senders, tuned = [], tuning.tuned(self, tune, padded, x_0)
            for i, x, own_tuned in zip(group, x_0.split(1), tuned):
                own = noise, pictures[i].header, Parameters(number, 0, prompt=prompts[i]), num_coding_steps
                if wanted is not None:
                    senders.append(target.sender(self, wanted, pictures[i].x, x, *own, own_tuned))
                elif fidelity is not None:
                    control = down_to(noise.timestep_of(fidelity), *own, self.error_calibration(), x.shape[1:])
                    senders.append(Sender(x, control, maps[i], own_tuned))
                else:
                    senders.append(Sender(x, within(pictures[i].max_bytes, *own), maps[i], own_tuned))
            walk, texts = target.walk if wanted else loop.walk, [prompts[i] for i in group]
            ends = self.reverse(noise, channel_of(number), senders, x_0.shape[1:], texts, watch, walk)
            for i, sender, (x_t, _) in zip(group, senders, ends):
                sender.end_at(x_t)
                files[i] = sender.file()
        return compressed(files, pictures)

    def decompress(
        self,
        bitstreams: bytes | list[bytes],
        reconstruction: str = "flow",
        realism: float = 1.0,
        num_inference_steps: int | None = None,
        guidance_scale: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        finisher: Source = None,
        **shared: Unpack[Decoding],
    ) -> DecompressOutput:
        """Files to pictures of their original sizes.

        Args:
            bitstreams: one file or a list. A file cut after its header gives the picture of the whole steps that are left.
            reconstruction: from the last noise level on, "flow" (probability-flow ODE), "ancestral" (random draws from `generator`, one
                for all or a list), or "denoised" (the network's first guess of the mean, in one call: a preview).
            realism: in [0, 1], between the mean and the reconstruction, see `diffusion.realism`. Below 1 a calibrated model has one call more.
            num_inference_steps: network calls of "flow" and "ancestral"; default: 10, fewer of "flow" from
                below the middle of the noise schedule, or 1 with a finisher.
            guidance_scale: above 1, guidance towards the file's prompt, in the reconstruction alone.
            finisher: a student in few calls, in place of the flow, see `diffusion.finishers.load`; or a pipeline that has one.
            shared: `limits`, `batch_size` and others that every codec takes, see `contract.ImageCodec.decompress`.

        Warns:
            RuntimeWarning: if the latent at a stream's end differs from the sender's, as `drift` in the result tells.

        Raises:
            BitstreamError: `NotABitstream`, `UnsupportedVersion`, `Corrupt`, `WrongModel`, `LimitExceeded`.
            ValueError: for an argument out of its range.
        """
        check_choice("reconstruction", reconstruction, RECONSTRUCTIONS if finisher is None else ("flow",))
        check_walk(num_inference_steps, realism)
        student = finisher_of(self, finisher)
        opened = self.read_files(read_file, bitstreams, reconstruction == "ancestral", **shared)
        files, notes, watch = opened.contents, opened.notes, opened.watch
        generators, coded = generators_of(generator, len(files)), schedule.from_pure_noise(self.noise_schedule())

        pictures, drifts = [None] * len(files), [None] * len(files)
        shapes = [(self.latent_shape(file.header.height, file.header.width), file.parameters.channel) for file in files]
        for group in groups_of(opened.batch_size, shapes):
            prompts, (shape, channel) = [files[i].parameters.prompt for i in group], shapes[group[0]]
            receivers = [Receiver(coded, files[i].parameters, files[i].payload) for i in group]
            ends = self.reverse(coded, channel_of(channel), receivers, shape, prompts, watch)
            how = Finish(reconstruction, realism, num_inference_steps, guidance_scale, [generators[i] for i in group], student)
            headers = [files[i].header for i in group]
            decoded = finished(self, ends, headers, prompts, how, opened.output_type, watch)
            for i, (x_t, _), picture in zip(group, ends, decoded):
                pictures[i], drifts[i] = picture, drift_of(x_t, files[i])
                notes[i] += [*files[i].notes(), *drift.notes(drifts[i])]
        return DecompressOutput(images=pictures, notes=notes, drift=drifts)

    # ------------------------------------------------------------------------------------------------------------ steps

    def reverse(
        self,
        noise: NoiseSchedule,
        channel: Channel,
        ends: list[Sender] | list[Receiver],
        shape: tuple[int, int, int],
        prompts: list[str],
        watch: Watch = None,
        walk: Callable = loop.walk,
    ) -> list[tuple[Tensor, int]]:
        """The coding loop with this model: x_t [1, C, h, w] and t of each picture where its stream ends."""
        # Shared noise that stands for x_T ~ N(0, I)
        x_t = randomness.normals(math.prod(shape), randomness.START, device=self._execution_device)
        x_t = x_t.view(1, *shape).repeat(len(ends), 1, 1, 1)
        error_variance = partial(reference.expected_error, noise, self.error_calibration(), self.variance_head)
        coding = partial(loop.reverse, noise, channel, x_t, ends, error_variance=error_variance, walk=walk)
        return self.with_network(coding, prompts, watch=watch)

    def error_calibration(self) -> dict | None:
        return (self.config.calibration or {}).get("error")

    def fingerprint(self, with_head: bool = True, with_calibration: bool = True, fused: bool = False) -> bytes:
        """Four bytes that tell this model from others, its variance head and its calibration included."""
        head = {"variance_head": self.variance_head} if with_head and self.variance_head is not None else {}
        return super().fingerprint(head, {"error": self.error_calibration() if with_calibration else None}, fused)

    def earlier_fingerprints(self) -> dict[bytes, str]:
        return {
            self.fingerprint(with_head=False): "before it had its variance head",
            self.fingerprint(with_calibration=False): "before it was calibrated",
            self.fingerprint(with_head=False, with_calibration=False): "as it is without variance head and calibration",
        }
