"""Relic: the quantized latent of a diffusion model, entropy-coded, and denoised from the timestep whose noise it resembles.

Relic, Azevedo, Gross, Schroers: Lossy Image Compression with Foundation Diffusion Models (ECCV 2024); Relic et al.: Bridging the Gap
between Gaussian Diffusion Models and Universal Quantization for Image Compression (CVPR 2025). The sender calls no diffusion network:

    picture --VAE--> x_0 --step width D, shared dither--> k --(bits)--> k --> x_0 + noise of variance D^2 / 12
        = x_t / alpha_t at the matching t  --(probability-flow ODE, few calls)--> x_0 --VAE--> picture
"""

import json
import math
import zlib
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from diffusers import (
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

from diffusers_compress import bitstream, context_model, diffusion, hyperprior, images, logistic, schedule
from diffusers_compress.bitstream import RELIC, Corrupt, Header, WrongModel
from diffusers_compress.entropy import Decoder, Encoder
from diffusers_compress.hyperprior import HyperPrior, ParameterNetwork
from diffusers_compress.latent_codec import (
    FAMILY_COMPONENTS,
    LatentCodecMixin,
    check_output,
    check_rate_and_prompts,
    groups_of,
    watched,
)
from diffusers_compress.logistic import UNIT
from diffusers_compress.outputs import CompressOutput, DecompressOutput, RoundTripOutput
from diffusers_compress.quantizer import Quantizer, level_at, powers, worth_coding
from diffusers_compress.relic_header import (
    MAX_PROMPT_BYTES,
    MODEL_NUMBERS,
    ROUNDINGS,
    SCALES_PER_OCTAVE,
    SHIFT_PARTS,
    STEP_BITS,
    STEPS_PER_OCTAVE,
    Parameters,
    step_number,
    step_width,
)

COARSEST = 2**STEP_BITS - 1
FILLED, AIM = 0.994, 0.997  # of the permitted size: where the search for the step width ends, and what it looks for
FORECASTS, SEARCHES = 3, 12
AFFINE_SHARE = 32  # a file must be so many times as large as its scales and shifts, 12 bits a channel, to have them
CONTEXT = 0.8  # share of the bits that is left when the neighbours are known, about

# -------------------------------------------------------------------------------------------------------------- a file's symbols


def walk_through(model, transmit):
    """The coding loop, the same for both ends: `model` is a generator as in `context_model`, transmit(channel, positions, mean,
    index) -> v of these positions."""
    try:
        request = next(model)
        while True:
            request = model.send(transmit(*request))
    except StopIteration:
        pass


class Sender:
    """Collects the symbols of v [C, h w] with their laws."""

    def __init__(self, v, dither):
        self.v, self.dither, self.symbols = v, dither, []

    def side_information(self, z, index):
        z = z.reshape(len(index), -1)
        self.symbols += [(k, np.zeros_like(k), np.full_like(k, i)) for k, i in zip(z, index)]

    def transmit(self, channel, positions, mean, index):
        v = self.v[channel][positions]
        self.symbols.append(((v + self.dither[channel][positions]) // UNIT, mean, index))
        return v

    def bits(self):
        return float(sum(logistic.code_length(*symbols).sum() for symbols in self.symbols))

    def steps_to(self, bits):
        """By how many steps (of STEPS_PER_OCTAVE) the step width should grow for the symbols to take about so many bits."""
        count = np.bincount(np.concatenate([index for _, _, index in self.symbols] or [np.zeros(1, dtype=int)]))
        steps = np.arange(-4, 4, 1 / 64)  # octaves
        index = np.arange(len(count)) - logistic.PER_OCTAVE * steps[:, None]
        expected = (count * logistic.entropy(index)).sum(1)
        share = max(bits, 1) / max(self.bits(), 1)
        return round(STEPS_PER_OCTAVE * float(np.interp(-share * expected[len(steps) // 2], -expected, steps)))

    def payload(self):
        encoder = Encoder()
        for symbols in self.symbols:
            logistic.encode(encoder, *symbols)
        return encoder.getvalue()


class Receiver:
    """Reads v [C, h w], and what the laws expect it to stand for."""

    def __init__(self, payload, dither):
        self.decoder, self.dither = Decoder(payload), dither
        self.v, self.expected = np.zeros_like(dither), np.zeros(dither.shape)

    def side_information(self, shape, index):
        zeros = np.zeros(math.prod(shape[1:]), dtype=np.int64)
        return np.stack([logistic.decode(self.decoder, zeros, zeros + i) for i in index]).reshape(shape)

    def transmit(self, channel, positions, mean, index):
        k = logistic.decode(self.decoder, mean, index)
        dither = self.dither[channel][positions]
        self.v[channel][positions] = UNIT * k - dither
        self.expected[channel][positions] = logistic.expectation(k, mean, index) - dither
        return self.v[channel][positions]


class EntropyModel:
    """The law of the symbols: of a trained `HyperPrior`, or adaptive."""

    def __init__(self, statistics, trained=None):
        self.number = MODEL_NUMBERS["hyperprior" if trained else "adaptive"]
        self.trained = trained.portable() if trained else None
        digest = zlib.crc32(json.dumps(statistics["std"]).encode())
        self.tables = (zlib.crc32(self.trained.integer_bytes(), digest) if trained else digest) & 0xFFFF

    def send(self, quantizer, v):
        """The `Sender` that has met all symbols."""
        sender = Sender(v, quantizer.dither)
        if quantizer.coded.any():
            z = None
            if self.trained:
                z = self.trained.side_information(v, quantizer.units, *quantizer.shape[1:])
                sender.side_information(z, self.trained.z_indices().long().tolist())
            walk_through(self.laws(quantizer, z), sender.transmit)
        return sender

    def receive(self, quantizer, payload):
        """The `Receiver` that has read all symbols. Corrupt if they cannot be."""
        receiver = Receiver(payload, quantizer.dither)
        if quantizer.coded.any():
            z = None
            if self.trained:
                index = self.trained.z_indices().long().tolist()
                z = receiver.side_information(self.trained.z_shape(*quantizer.shape[1:]), index)
            walk_through(self.laws(quantizer, z), receiver.transmit)
        return receiver

    def laws(self, quantizer, z):
        where = (*quantizer.shape[1:], quantizer.units, quantizer.dither)
        if self.trained:
            return hyperprior.learned(self.trained, z, *where, quantizer.dithered)
        return context_model.adaptive(*where)


# ------------------------------------------------------------------------------------------------------------ a file as a whole


def read_file(data, limits=bitstream.DEFAULT_LIMITS):
    """Parse a Relic file up to its symbols: (header, parameters, payload)."""
    header, offset = bitstream.read_header(data, limits)
    bitstream.check_codec(header, RELIC)
    parameters = Parameters.from_bytes(header.parameters, limits)
    return header, parameters, bitstream.read_payload(data, offset)[0]


def describe(data, limits=bitstream.DEFAULT_LIMITS):
    """The facts of a Relic file as plain values, without a model."""
    header, parameters, payload = read_file(data, limits)
    return {
        "codec": "Relic",
        "width": header.width,
        "height": header.height,
        "bytes": len(data),
        "bpp": 8 * len(data) / (header.width * header.height),
        "model": header.fingerprint.hex(),
        "prompt": parameters.prompt,
        "entropy_model": next(name for name, number in MODEL_NUMBERS.items() if number == parameters.model),
        "rounding": ROUNDINGS[parameters.dithered],
        "step": step_width(parameters.step),
        "timestep": parameters.timestep,
        "payload": len(payload),
        "complete": True,  # a file that was cut short cannot be read
    }


class File:
    """A picture's file at one step width after another, until its size is as wanted."""

    def __init__(self, x_0, header, plan, model, statistics):
        """plan(step number, coded channels or None) -> (parameters, quantizer)."""
        self.x_0, self.header, self.plan, self.model, self.statistics = x_0, header, plan, model, statistics
        self.tried = {}

    def at(self, step, coded=None):
        """(size in bytes, parameters, sender) with step width number `step`; the size may be two bytes off."""
        key = step, tuple(coded or ())
        if key not in self.tried:
            parameters, quantizer = self.plan(step, coded)
            sender = self.model.send(quantizer, quantizer.values(self.x_0))
            size = bitstream.overhead(replace(self.header, parameters=parameters.to_bytes())) + math.ceil(sender.bits() / 8)
            self.tried[key] = size, parameters, sender
        return self.tried[key]

    def data(self, step, coded=None):
        _, parameters, sender = self.at(step, coded)
        return bitstream.pack(replace(self.header, parameters=parameters.to_bytes()), sender.payload())

    def within(self, max_bytes):
        """The largest file up to this size. ValueError if even the smallest exceeds it."""
        # The size jumps where a channel comes in, so the channels stay fixed while the step width is sought.
        step, coded = self.guess(max_bytes)
        for channels in coded, [False] * len(coded):
            step = self.finest(max_bytes, step, channels)
            while len(data := self.data(step, channels)) > max_bytes and step < COARSEST:
                step += 1
            if len(data) <= max_bytes:
                return data
        raise ValueError(
            f"a {self.header.width}x{self.header.height} picture may take {int(max_bytes)} bytes here; the smallest file has {len(data)}"
        )

    def finest(self, max_bytes, step, coded):
        """About the smallest step whose file is not larger; the search starts at `step`."""
        low, high = -1, COARSEST  # below it too large; small enough
        for tries in range(SEARCHES):
            size, _, sender = self.at(step, coded)
            if size > max_bytes:
                low = step
            else:
                high = step
            if high - low <= 1 or FILLED * max_bytes <= size <= max_bytes:
                break
            forecast = sender.steps_to(sender.bits() + 8 * (AIM * max_bytes - 1 - size))
            step += forecast << max(0, tries - 1)  # further each time, lest it creep
            if tries >= FORECASTS and low >= 0 and high < COARSEST:
                step = (low + high) // 2
            step = max(low + 1, min(high - 1, step))
        return high

    def guess(self, max_bytes):
        """Number of a step width that should give such a size, and the channels worth coding with it."""
        power = powers(self.x_0, self.statistics)
        for step in range(0, COARSEST + 1, 15):
            worth, bits = worth_coding(power, step_width(step))
            if self.x_0[0].numel() * float(bits.mean(1)[worth].sum()) * CONTEXT / 8 + 30 <= max_bytes:
                break
        return step, worth.tolist()


# ------------------------------------------------------------------------------------------------------------- the pipeline


class RelicPipeline(LatentCodecMixin, DiffusionPipeline):
    """Image codec from a pretrained diffusion model (see `families`) that encodes without calling its network.

    `from_pretrained` takes such a model's folder or Hub id as it is. `compress` gives whole files as bytes, `decompress`
    gives pictures, calling the pipeline does both.

    Args:
        scheduler: gives the noise levels; it must solve the probability-flow ODE, by which `decompress` finishes the picture.
        vae, ..., transformer, force_zeros_for_empty_prompt: as in diffusers' own pipeline of the family, which may lack some.
        hyperprior: a trained entropy model. Without one the adaptive model is used.
        parameter_network: chooses step widths, shifts and the timestep. Without one they follow from the step width alone.
        calibration: what was measured of the model; key "latent" holds `calibration.latent_statistics`.
    """

    _optional_components = [*FAMILY_COMPONENTS, "hyperprior", "parameter_network"]

    def __init__(
        self,
        scheduler: KarrasDiffusionSchedulers | FlowMatchEulerDiscreteScheduler,
        vae: AutoencoderKL | AutoencoderTiny | None = None,
        text_encoder: CLIPTextModel | CLIPTextModelWithProjection | None = None,
        tokenizer: CLIPTokenizer | None = None,
        unet: UNet2DConditionModel | UNet2DModel | None = None,
        text_encoder_2: CLIPTextModelWithProjection | T5EncoderModel | None = None,
        tokenizer_2: CLIPTokenizer | T5TokenizerFast | None = None,
        text_encoder_3: T5EncoderModel | None = None,
        tokenizer_3: T5TokenizerFast | None = None,
        transformer: SD3Transformer2DModel | FluxTransformer2DModel | None = None,
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
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1) if vae is not None else 1

    # ------------------------------------------------------------------------------------------------------ public calls

    @torch.no_grad()
    def compress(
        self,
        image: PipelineImageInput,
        target_bpp: float | None = None,
        max_bytes: int | None = None,
        quality: float | None = None,
        prompt: str | list[str] = "",
        rounding: str = "dithered",
        entropy_model: str | None = None,
        batch_size: int = 8,
    ) -> CompressOutput:
        """Pictures to files.

        Args:
            image: a PIL picture, numpy array [H, W, C] or tensor [C, H, W] (see `images.to_tensor`), or a list of them, any sizes.
            target_bpp: bits per pixel that no file exceeds, 8 * bytes / (width * height).
            max_bytes: size in bytes that no file exceeds.
            quality: in (0, 1]; the step width belongs to the timestep (1 - quality) (T - 1). Exactly one of these three.
            prompt: one for all or one for each picture; stored in the file.
            rounding: "dithered" (universal quantization: the error is noise, whatever the picture), or "plain".
            entropy_model: "hyperprior" or "adaptive"; default: the hyperprior if the pipeline has one.
            batch_size: pictures of like size that go through the autoencoder together at most.

        Raises:
            ValueError: for an argument out of its range, or a size that even the coarsest file exceeds.
        """
        pictures = images.as_list(image)
        prompts = [prompt] * len(pictures) if isinstance(prompt, str) else list(prompt)
        check_compress_arguments(target_bpp, max_bytes, quality, rounding, prompts, pictures)
        model = self.entropy_model(entropy_model)
        noise = self.noise_schedule()
        tensors, notes = zip(*map(images.to_tensor, pictures))
        identity = self.fingerprint()

        files = [b""] * len(pictures)
        with self.progress_bar(total=len(pictures)) as bar:
            for group in groups_of(batch_size, [self.latent_shape(*x.shape[-2:]) for x in tensors]):
                x_0 = self.encode_picture(torch.stack([self.pad(tensors[i]) for i in group]))
                for i, x in zip(group, x_0.cpu()):
                    height, width = tensors[i].shape[-2:]
                    if not x.isfinite().all():
                        raise ValueError("the autoencoder's output is not finite; load it with dtype float32 or bfloat16")

                    size = math.inf if quality is not None else max_bytes or width * height * target_bpp / 8

                    def plan(step, coded):
                        parameters = Parameters(
                            model.number, rounding == "dithered", step, 0, model.tables, coded, prompt=prompts[i]
                        )
                        return self.plan(parameters, x, noise, affine=size >= AFFINE_SHARE * 12 * len(x) / 8)

                    file = File(x, Header(RELIC, width, height, identity, b""), plan, model, self.statistics())
                    if quality is None:
                        files[i] = file.within(size)
                    else:
                        t = round((1 - quality) * (noise.alpha.numel() - 1))
                        files[i] = file.data(step_number(math.sqrt(12) / float(noise.ratio[t])))
                    bar.update()
        self.maybe_free_model_hooks()
        bpp = [8 * len(file) / (x.shape[-1] * x.shape[-2]) for file, x in zip(files, tensors)]
        return CompressOutput(bitstreams=files, bpp=bpp, notes=list(notes))

    @torch.no_grad()
    @watched
    def decompress(
        self,
        bitstreams: bytes | list[bytes],
        realism: float = 1.0,
        num_inference_steps: int = 5,
        guidance_scale: float = 1.0,
        output_type: str = "pil",
        allow_other_model: bool = False,
        limits: bitstream.Limits = bitstream.DEFAULT_LIMITS,
        batch_size: int = 8,
        callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
    ) -> DecompressOutput:
        """Files to pictures of their original sizes.

        Args:
            bitstreams: one file or a list.
            realism: 1 for the denoised picture, 0 for a preview that calls no diffusion network, the mean that the entropy model
                expects; between them a blend of both pictures.
            num_inference_steps: network calls.
            guidance_scale: above 1, guidance towards the file's prompt.
            output_type: "pil", "np" or "pt".
            allow_other_model: decode although the file was made with other weights (the entropy model must be the file's own).
            limits: sizes that a file may claim.
            batch_size: files of like size that go through the network together at most.
            callback_on_step_end: called after each network call with the pipeline, the number of the step, its noisiest timestep and a
                dictionary of the tensors named in `callback_on_step_end_tensor_inputs`: "latents", x_t, and "noise_pred", the network's
                output. It looks on: what it returns counts for nothing, since both ends must hold the same x_t.

        Raises:
            BitstreamError: `NotABitstream`, `UnsupportedVersion`, `Corrupt`, `WrongModel`, `LimitExceeded`.
            ValueError: for an argument out of its range.
        """
        check_decompress_arguments(realism, num_inference_steps, output_type)
        files = [read_file(data, limits) for data in ([bitstreams] if isinstance(bitstreams, (bytes, bytearray)) else bitstreams)]
        self.check_model([header for header, *_ in files], allow_other_model)
        noise = self.noise_schedule()

        pictures = [None] * len(files)
        shapes = [self.latent_shape(header.height, header.width) for header, *_ in files]
        for group in groups_of(batch_size, shapes):
            read = [self.read_latent(*files[i][1:], shapes[i], noise) for i in group]
            y_hat, expected = (torch.stack(column).float().to(self._execution_device) for column in zip(*read))
            x = 0.0
            if realism < 1:
                x = (1 - realism) * self.decode_latent(expected).clamp(-1, 1)
            if realism > 0:
                walks = []
                for i, y in zip(group, y_hat.split(1)):
                    t = files[i][1].timestep
                    walks.append(diffusion.solve(noise.level(t)[0] * y, t, num_inference_steps, noise, self.scheduler))
                x_0 = torch.cat(self.run(walks, [files[i][1].prompt for i in group], guidance_scale))
                # Eq. 17 of the survey, in pixels
                x = x + realism * self.decode_latent(x_0).clamp(-1, 1)
            for i, picture in zip(group, x):
                header = files[i][0]
                pictures[i] = images.to_output(images.crop(picture, header.height, header.width)[None], output_type)[0]
        self.maybe_free_model_hooks()
        return DecompressOutput(images=pictures)

    def __call__(
        self,
        image: PipelineImageInput,
        target_bpp: float | None = None,
        max_bytes: int | None = None,
        quality: float | None = None,
        prompt: str | list[str] = "",
        realism: float = 1.0,
        num_inference_steps: int = 5,
        guidance_scale: float = 1.0,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
    ) -> RoundTripOutput | tuple:
        """The round trip: `compress`, then `decompress` of those files; the arguments are theirs.

        Examples:
            >>> from PIL import Image
            >>> from diffusers_compress import RelicPipeline, embedded_model
            >>> pipe = RelicPipeline.from_pretrained(embedded_model())
            >>> image = Image.linear_gradient("L").convert("RGB")
            >>> both = pipe(image, max_bytes=100)
            >>> len(both.bitstreams[0]) <= 100, both.images[0].size
            (True, (256, 256))
        """
        check_decompress_arguments(realism, num_inference_steps, output_type)
        sent = self.compress(image, target_bpp, max_bytes, quality, prompt)
        watch = {
            "callback_on_step_end": callback_on_step_end,
            "callback_on_step_end_tensor_inputs": callback_on_step_end_tensor_inputs,
        }
        decoded = self.decompress(sent.bitstreams, realism, num_inference_steps, guidance_scale, output_type, **watch)
        output = RoundTripOutput(images=decoded.images, **sent)
        return output if return_dict else output.to_tuple()

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

    def plan(
        self, parameters: Parameters, x_0: Tensor, noise: schedule.NoiseSchedule, affine: bool = True
    ) -> tuple[Parameters, Quantizer]:
        """The parameters with their timestep and, if `affine`, what the parameter network chooses; their `Quantizer` for x_0."""
        statistics, level, step = self.statistics(), 0.0, step_width(parameters.step)
        # With less noise than at the first timestep there is nothing to choose between.
        if affine and self.parameter_network is not None and step / math.sqrt(12) > 1 / float(noise.ratio[0]):
            scales, shifts, level = self.parameter_network.portable().choose(x_0, statistics, step)
            parameters.scales = [round(SCALES_PER_OCTAVE * scale) for scale in scales]
            parameters.shifts = [round(SHIFT_PARTS * shift) for shift in shifts]
        if parameters.coded is None:
            parameters.coded = worth_coding(powers(x_0, statistics), step)[0].tolist()
        quantizer = Quantizer(parameters, statistics, x_0.shape)
        # D^2 / 12 = sigma^2 / alpha^2, Relic et al. 2025
        sigma = quantizer.level(quantizer.values(x_0), x_0) * 2**level * level_at(statistics, step)
        parameters.timestep = schedule.timestep_at(noise, 1 / sigma)
        return parameters, quantizer

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


def check_compress_arguments(target_bpp, max_bytes, quality, rounding, prompts, pictures):
    check_rate_and_prompts(target_bpp, max_bytes, quality, prompts, pictures, MAX_PROMPT_BYTES)
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding must be one of {list(ROUNDINGS)}, not {rounding!r}")


def check_decompress_arguments(realism, num_inference_steps, output_type):
    if not 0 <= realism <= 1:
        raise ValueError(f"realism must be from 0 to 1, not {realism}")
    check_output(num_inference_steps, output_type)
