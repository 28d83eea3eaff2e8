"""UQDM: a diffusion model on pixels whose noise is uniform, so that each of its few steps is sent exactly by dithered rounding.

Yang, Will & Mandt: Progressive Compression with Universally Quantized Diffusion Models (ICLR 2025):

    z_T, shared noise --> network of z_t: mean and scale of z_s --(round, bits)--> z_s --> ... --> z_0 --(bits)--> pixels
        picture: from any z_t the network's mean, the ODE or random draws; from the pixels themselves, lossless

A file is a header and a section for each step, so it may end after any of them.
"""

from typing import Unpack

import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import PipelineImageInput
from torch import Tensor
from tqdm import tqdm

from diffusers_compress import images
from diffusers_compress.arguments import check_choice, check_walk, generators_of
from diffusers_compress.codecs.uqdm import loop
from diffusers_compress.codecs.uqdm.format import read_file, shortened
from diffusers_compress.codecs.uqdm.tiles import blended
from diffusers_compress.contract import UQDM
from diffusers_compress.diffusion.uqdm_scheduler import UQDMScheduler
from diffusers_compress.fingerprint import fingerprint
from diffusers_compress.models.uqdm_network import UQDMNetwork
from diffusers_compress.outputs import CompressOutput, DecompressOutput
from diffusers_compress.pipeline import Callback, CodecMixin, Decoding, Rate, Watch, check_finite, compressed
from diffusers_compress.weights import portable


class UQDMPipeline(CodecMixin, DiffusionPipeline):
    """Image codec from a diffusion model with universally quantized steps, from a few tenths of a bit per pixel to lossless.

    `from_pretrained` takes a folder or Hub id that one of these pipelines was saved to (`examples/convert_uqdm.py` makes one of
    the published weights). `compress` gives whole files as bytes, `decompress` gives pictures, calling the pipeline does both. A
    file that was cut short decodes to a coarser picture.

    Both ends compute the network in float64, whatever the type of its weights, which must be the same. Files say so much of what
    it said that another machine's arithmetic either gives the same symbols or is noticed.

    Args:
        network: predicts the noise and how wrong that is.
        scheduler: the noise levels that it was trained at.

    Examples:
        >>> from PIL import Image
        >>> from diffusers_compress import UQDMPipeline, embedded_model
        >>> pipe = UQDMPipeline.from_pretrained(embedded_model("uqdm"))
        >>> image = Image.linear_gradient("L").convert("RGB").resize((32, 32))
        >>> both = pipe(image, lossless=True)
        >>> both.images[0].tobytes() == image.tobytes()
        True
    """

    model_cpu_offload_seq = "network"
    _exclude_from_cpu_offload = ["network"]  # small, and copied to float64

    def __init__(self, network: UQDMNetwork, scheduler: UQDMScheduler):
        super().__init__()
        self.register_modules(network=network, scheduler=scheduler)

    # ------------------------------------------------------------------------------------------------------ public calls

    def compress(
        self,
        image: PipelineImageInput,
        num_coding_steps: int | None = None,
        lossless: bool = False,
        batch_size: int = 8,
        callback_on_step_end: Callback = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
        **rate: Unpack[Rate],
    ) -> CompressOutput:
        """Pictures to files. The model's steps decide their sizes.

        Args:
            image: one or a list, of any sizes: PIL pictures, numpy arrays [H, W, C] or tensors [C, H, W] (see `images.to_tensor`).
            num_coding_steps: coded steps, 0 to the model's; default: all.
            lossless: after all steps send the 8-bit pixels themselves.
            batch_size: tiles that go through the network together at most.
            callback_on_step_end, callback_on_step_end_tensor_inputs: as in `decompress`; the timestep is the level of z_t.
            rate: `target_bpp` or `max_bytes`, which no file exceeds: it has as many steps as fit; neither need be given.

        Raises:
            ValueError: for an argument out of its range, a size that even a file without steps exceeds or, if it is to be
                lossless, one that the whole file exceeds; weights of 16 bits, which do not promise it; samples of more than 8
                bits.
        """
        most = self.scheduler.config.num_steps
        steps = most if num_coding_steps is None else num_coding_steps
        if steps not in range(most + 1) or lossless and steps < most:
            raise ValueError(f"num_coding_steps must be 0 to {most}, all {most} if lossless, not {num_coding_steps}")
        if lossless and self.network.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"lossless files need weights as they were saved, not {self.network.dtype}: load with dtype float32")
        watch = self.watch(callback_on_step_end, callback_on_step_end_tensor_inputs)
        pictures = self.read_pictures(UQDM, image, **rate)
        if lossless and not all(images.is_8_bit(picture.x) for picture in pictures):
            raise ValueError("lossless files hold 8 bits a sample, and this picture has more; round it first")

        files = []
        with self.labelled_bar("network calls", steps * len(pictures)) as bar:
            network = self.tiled_network(batch_size, watch, bar)
            for header, x, limit, _ in pictures:
                sender = loop.Sender(loop.samples(x), self.scheduler)
                z = loop.chain(network, self.scheduler, x.shape, self.coding_device, steps, sender.transmit)
                parameters, sections = sender.file(z if lossless else None)
                fewest = len(sections) if lossless else 0
                files.append(shortened(header, parameters, sections, limit, fewest))
        return compressed(files, pictures)

    def decompress(
        self,
        bitstreams: bytes | list[bytes],
        reconstruction: str = "flow",
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_inference_steps: int = 10,
        **shared: Unpack[Decoding],
    ) -> DecompressOutput:
        """Files to pictures of their original sizes.

        Args:
            bitstreams: one file or a list. A file cut after its header gives the picture of the whole steps that are left.
            reconstruction: from the last level on, "flow" (probability-flow ODE), "ancestral" (random draws from `generator`, one
                for all or a list), or "denoised" (the network's mean in one call). A lossless file gives its pixels.
            num_inference_steps: network calls of "flow" at most; it goes over the model's levels.
            shared: `limits`, `batch_size` and others that every codec takes, see `contract.ImageCodec.decompress`. With
                `allow_other_model` only a file can decode that was made with weights of which signs alone differ.

        Raises:
            BitstreamError: `NotABitstream`, `UnsupportedVersion`, `Corrupt`, `WrongModel`, `LimitExceeded`; `WrongModel` too if
                the network says something else here than at the sender's.
            ValueError: for an argument out of its range.
        """
        check_walk(num_inference_steps)
        check_choice("reconstruction", reconstruction, loop.RECONSTRUCTIONS)
        files = self.read_files(read_file, bitstreams, reconstruction == "ancestral", **shared)
        generators = generators_of(generator, len(files.contents))

        pictures = []
        with self.labelled_bar("network calls") as bar:
            network = self.tiled_network(files.batch_size, files.watch, bar)
            for i, (header, parameters, sections, _) in enumerate(files.contents):
                receiver = loop.Receiver(parameters, sections, self.scheduler)
                shape, steps = (3, header.height, header.width), min(len(sections), len(parameters.sizes))
                z = loop.chain(network, self.scheduler, shape, self.coding_device, steps, receiver.transmit)
                if receiver.has_pixels:
                    x = receiver.pixels(z)
                else:
                    level = self.scheduler.config.num_steps - steps
                    x = loop.finish(network, self.scheduler, z, level, reconstruction, num_inference_steps, generators[i])
                pictures += self.pictures_of(loop.picture(x)[None], [header], files.output_type)
        return DecompressOutput(images=pictures, notes=files.notes)

    # ------------------------------------------------------------------------------------------------------------ steps

    @property
    def coding_device(self) -> torch.device:
        """Where the network is computed: the pipeline's device, or the CPU if that has no float64 or no weights."""
        device = self._execution_device
        return torch.device("cpu") if device.type in ("mps", "meta") else device

    def tiled_network(self, batch_size: int, watch: Watch, bar: tqdm) -> loop.Network:
        """network(z_t [3, H, W], t) -> (epsilon_hat, factor), in float64, for pictures of any size."""
        model, config = portable(self.network).to(self.coding_device), self.network.config
        multiple = config.patch * 2 ** (len(config.block_out_channels) - 1)
        calls = 0

        def network(z: Tensor, t: int) -> tuple[Tensor, Tensor]:
            nonlocal calls
            time, sigma = self.scheduler.time(t), self.scheduler.level(t)[1]

            def of_tiles(tiles):
                levels = [torch.full((len(tiles),), value, dtype=torch.float64, device=z.device) for value in (time, sigma)]
                return torch.cat(model(tiles, *levels), 1)

            output = blended(of_tiles, z, config.sample_size, multiple, batch_size)
            noise, factor = check_finite(output, "the network's output").chunk(2)
            bar.update()
            if watch is not None:
                watch(calls, t, {"latents": z, "noise_pred": noise})
            calls += 1
            return noise, factor

        return network

    def fingerprint(self, fused: bool = False) -> bytes:
        """Four bytes that tell this model from others: signs of the weights, noise levels, tiles. fused: as if active adapters
        were."""
        names = ["num_steps", "gamma_min", "gamma_max", "gamma_origin", "reference"]
        config = {name: self.scheduler.config[name] for name in names} | {"sample_size": self.network.config.sample_size}
        return fingerprint({"network": self.network}, config, fused)
