"""CDC: a learned transform codec whose decoder is a diffusion model that is conditioned on what was sent.

Yang & Mandt: Lossy Image Compression with Conditional Diffusion Models (NeurIPS 2023):

    picture --analysis--> y --(round, bits)--> y_hat --decoder--> context --denoiser of x_t--> picture
                          '--> z --(round, bits)--> tables of y

The content is sent; texture is painted from noise, as much as `gamma` says. Their program estimates the bits; this one writes them:
whatever decides a table of the range coder is computed in integers.
"""

import math
from dataclasses import replace
from typing import Any, Unpack

import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import PipelineImageInput
from torch import Tensor
from tqdm import tqdm

from diffusers_compress import images
from diffusers_compress.arguments import check_walk
from diffusers_compress.codecs.cdc import symbols
from diffusers_compress.codecs.cdc.format import MAX_SEED, Parameters, read_file
from diffusers_compress.coding import randomness
from diffusers_compress.contract import CDC
from diffusers_compress.diffusion import equations
from diffusers_compress.diffusion.cdc_scheduler import CDCScheduler
from diffusers_compress.errors import WrongModel
from diffusers_compress.fingerprint import fingerprint
from diffusers_compress.format import container
from diffusers_compress.format.container import Header
from diffusers_compress.models.cdc_context import CDCContextModel
from diffusers_compress.models.cdc_unet import CDCUNet
from diffusers_compress.outputs import CompressOutput, DecompressOutput
from diffusers_compress.pipeline import CodecMixin, Decoding, Rate, Watch, check_finite, compressed, groups_of


class CDCPipeline(CodecMixin, DiffusionPipeline):
    """Image codec of a learned transform and a conditional diffusion decoder, for some tenths of a bit per pixel.

    `from_pretrained` takes a folder or Hub id that one of these pipelines was saved to (`examples/train_cdc.py` trains one,
    `examples/convert_cdc.py` makes one of the published weights). `compress` gives whole files as bytes, `decompress` gives
    pictures, calling the pipeline does both.

    Args:
        context_model: what is sent, and the features that follow from it.
        unet: the denoiser that sees these features.
        scheduler: the noise levels that it was trained at.

    Examples:
        >>> from PIL import Image
        >>> from diffusers_compress import CDCPipeline, embedded_model
        >>> pipe = CDCPipeline.from_pretrained(embedded_model("cdc"))
        >>> image = Image.linear_gradient("L").convert("RGB")
        >>> both = pipe(image, target_bpp=0.2, num_inference_steps=4)
        >>> both.bpp[0] <= 0.2, both.images[0].size
        (True, (256, 256))
    """

    model_cpu_offload_seq = "unet"
    _exclude_from_cpu_offload = ["context_model"]  # small, and read outside its forward

    def __init__(self, context_model: CDCContextModel, unet: CDCUNet, scheduler: CDCScheduler):
        super().__init__()
        self.register_modules(context_model=context_model, unet=unet, scheduler=scheduler)

    # ------------------------------------------------------------------------------------------------------ public calls

    def compress(
        self,
        image: PipelineImageInput,
        fidelity: float | None = None,
        seed: int = 0,
        batch_size: int = 8,
        **rate: Unpack[Rate],
    ) -> CompressOutput:
        """Pictures to files, each at one of the model's rates.

        Args:
            image: one or a list, of any sizes: PIL pictures, numpy arrays [H, W, C] or tensors [C, H, W] (see `images.to_tensor`).
            fidelity: in (0, 1]; the place among the model's rates.
            seed: of the noise that a decoder starts from, 0 to 2**32 - 1; stored in the file.
            batch_size: of no effect. Pictures are encoded one by one, so that their bytes do not depend on each other.
            rate: `target_bpp` or `max_bytes`, which no file exceeds: it has the highest of the model's rates that fits. Without any of
                the three the file has the highest of all.

        Raises:
            ValueError: for an argument out of its range, or a size that even the lowest rate exceeds.
        """
        if seed not in range(MAX_SEED + 1):
            raise ValueError(f"seed must be a whole number from 0 to {MAX_SEED}, not {seed}")
        pictures = self.read_pictures(CDC, image, {"fidelity": fidelity}, **rate)

        files = []
        with self.labelled_bar("pictures", len(pictures)) as bar:
            for header, x, limit, _ in pictures:
                files.append(self.largest_file(header, x, seed, limit, fidelity))
                bar.update()
        return compressed(files, pictures)

    def decompress(
        self,
        bitstreams: bytes | list[bytes],
        gamma: float = 0.8,
        num_inference_steps: int = 17,
        preview: bool = False,
        **shared: Unpack[Decoding],
    ) -> DecompressOutput:
        """Files to pictures of their original sizes.

        Args:
            bitstreams: one file or a list.
            gamma: deviation of the noise that the picture is painted from: 0 for the least error, published: 0.8.
            num_inference_steps: network calls. Published: 65, or 200 to 500 for a model that predicts the noise.
            preview: the estimate that the context holds, without the denoiser, of models that were trained to give it.
            shared: `limits`, `batch_size` and others that every codec takes, see `contract.ImageCodec.decompress`.

        Raises:
            BitstreamError: `NotABitstream`, `UnsupportedVersion`, `Corrupt`, `WrongModel`, `LimitExceeded`.
            ValueError: for an argument out of its range.
        """
        check_walk(num_inference_steps)
        if not gamma >= 0:
            raise ValueError(f"gamma must be at least 0, not {gamma}")
        if preview and not self.context_model.config.preview:
            raise ValueError("this model was not trained to give previews; decode with few num_inference_steps")
        timesteps = self.scheduler.timesteps(num_inference_steps)
        files = self.read_files(read_file, bitstreams, **shared)
        read = [self.read_symbols(*content) for content in files.contents]

        pictures: list = [None] * len(read)
        with self.labelled_bar("network calls") as bar:
            for group in groups_of(files.batch_size, [y_hat.shape for y_hat in read]):
                headers, parameters, _ = zip(*(files.contents[i] for i in group))
                rate = self.rates([each.level for each in parameters])
                context = self.context_model.synthesise(torch.stack([read[i] for i in group]).to(**self.place), rate)
                if preview:
                    x_0 = self.context_model.preview(context)
                    bar.update()
                else:
                    x_0 = self.paint(context, rate, [each.seed for each in parameters], gamma, timesteps, files.watch, bar)
                for i, picture in zip(group, self.pictures_of(x_0, list(headers), files.output_type)):
                    pictures[i] = picture
        return DecompressOutput(images=pictures, notes=files.notes)

    # -------------------------------------------------------------------------------------------------------- encoding

    def largest_file(self, header: Header, x: Tensor, seed: int, limit: float, fidelity: float | None) -> bytes:
        """The file of a picture x [3, H, W] at the highest rate within the limit in bytes, or at the one that `fidelity` says."""
        x = images.pad(x, self.multiple)[None].to(**self.place)
        last = self.context_model.config.levels - 1
        if fidelity is not None:
            return self.file(header, x, seed, round(fidelity * last))
        best, data = None, self.file(header, x, seed, last)
        if len(data) <= limit:
            return data
        low, high = -1, last  # the highest level known to fit, and the lowest known not to
        while high - low > 1:
            level = (low + high) // 2
            data = self.file(header, x, seed, level)
            low, high, best = (level, high, data) if len(data) <= limit else (low, level, best)
        if best is None:
            raise ValueError(
                f"a {header.width}x{header.height} picture may take {int(limit)} bytes here; at the model's lowest rate it has {len(data)}"
            )
        return best

    def file(self, header: Header, x: Tensor, seed: int, level: int) -> bytes:
        """Of a padded picture x [1, 3, H, W] at this rate."""
        y, z = self.context_model.analyse(x, self.rates([level]))
        y, z = check_finite(y, "the latent")[0], check_finite(z, "the side information")[0]
        parameters = Parameters(level, seed).to_bytes()
        return container.pack(replace(header, parameters=parameters), symbols.encode(self.context_model, y, z, level))

    # -------------------------------------------------------------------------------------------------------- decoding

    def read_symbols(self, header: Header, parameters: Parameters, payload: bytes) -> Tensor:
        """y_hat [M, h, w] of a file. WrongModel if this model has no such rate."""
        if parameters.level >= self.context_model.config.levels:
            raise WrongModel(
                f"the file is at rate {parameters.level} of its model, this one has {self.context_model.config.levels}; "
                "load the model that the file was made with"
            )
        height, width = (side + -side % self.multiple for side in (header.height, header.width))
        return symbols.decode(self.context_model, payload, parameters.level, height, width)

    def paint(
        self,
        context: list[Tensor],
        rate: Tensor | None,
        seeds: list[int],
        gamma: float,
        timesteps: list[int],
        watch: Watch,
        bar: tqdm,
    ) -> Tensor:
        """x_0 [B, 3, H, W] from the context, down these timesteps. Yang & Mandt 2023, eq. 7 with DDIM's steps."""
        shape = 3, *(side * self.unet.config.patch for side in context[0].shape[2:])
        noise = [randomness.normals(math.prod(shape), randomness.START, seed).reshape(shape) for seed in seeds]
        x_t = gamma * torch.stack(noise).to(context[0].device, memory_format=torch.channels_last)  # in which norms are faster
        context = [features.contiguous(memory_format=torch.channels_last) for features in context]
        for step, (t, s) in enumerate(zip(timesteps, [*timesteps[1:], -1])):
            time = torch.full((len(x_t),), self.scheduler.time(t), device=x_t.device)
            output = self.unet(x_t.to(self.unet.dtype), time, context, rate if self.unet.config.rate_input else None)
            alpha, sigma = self.scheduler.level(t)
            prediction_type = self.scheduler.config.prediction_type
            x_0 = equations.predict_x0(check_finite(output, "the network's output"), x_t, alpha, sigma, prediction_type)
            x_0 = x_0.clamp(-1, 1) if self.scheduler.config.clip_sample else x_0
            if watch is not None:
                watch(step, t, {"latents": x_t, "noise_pred": output})
            x_t = equations.ddim(x_t, x_0, alpha, sigma, *self.scheduler.level(s))
            bar.update()
        return x_t

    # ------------------------------------------------------------------------------------------------------------ model

    @property
    def multiple(self) -> int:
        """What sides of pictures are filled up to multiples of."""
        return max(self.context_model.multiple, self.unet.multiple)

    @property
    def place(self) -> dict[str, Any]:
        """Where and in which type the context model computes."""
        return {"device": self._execution_device, "dtype": self.context_model.dtype}

    def rates(self, levels: list[int]) -> Tensor | None:
        """Levels as the networks are told of them, [B]; None if the model has one rate."""
        if self.context_model.config.levels == 1:
            return None
        return torch.tensor([self.context_model.rate_of(level) for level in levels]).to(**self.place)

    def fingerprint(self, fused: bool = False) -> bytes:
        """Four bytes that tell this model from others: signs of the weights, the integers that tables follow from, noise levels."""
        names = ["num_train_timesteps", "beta_schedule", "prediction_type", "clip_sample"]
        config = {name: self.scheduler.config[name] for name in names} | {"tables": self.context_model.identity()}
        return fingerprint({"context_model": self.context_model, "unet": self.unet}, config, fused)
