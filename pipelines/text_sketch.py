"""Text+Sketch: a prompt, a sketch and a few colours; Stable Diffusion with a ControlNet paints a picture like it.

Lei et al., Text + Sketch: Image Compression at Ultra Low Rates (ICML 2023 workshop):

    picture --caption, inversion, or the user--> token ids --.
            --edge detector, threshold--> lines on a grid ----(bits)--> ControlNet and UNet paint from noise --VAE--> picture
            --means over 8 x 5 cells--> thumbnail -----------'

What comes out means the same; it is not the same picture. The sender may paint several and let the file name the best by its seed.
"""

import math
import os
from collections.abc import Callable, Sequence
from typing import Self, Unpack

from diffusers import AutoencoderDC, AutoencoderKL, ControlNetModel, DiffusionPipeline, UNet2DConditionModel
from diffusers.image_processor import PipelineImageInput
from diffusers.schedulers import KarrasDiffusionSchedulers
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from diffusers_compress import images
from diffusers_compress.arguments import check_positive, check_walk
from diffusers_compress.codecs.text_sketch import payload, thumbnail
from diffusers_compress.codecs.text_sketch.control import (
    ControlledStableDiffusion,
    Painting,
    conditioning_of,
    enlarged,
    recoloured,
)
from diffusers_compress.codecs.text_sketch.draw import Drawing, file_of, reseeded
from diffusers_compress.codecs.text_sketch.edges import canny, spread
from diffusers_compress.codecs.text_sketch.format import MAX_SEED, Parameters, read_file
from diffusers_compress.codecs.text_sketch.payload import Content
from diffusers_compress.codecs.text_sketch.similarity import structure
from diffusers_compress.coding import randomness
from diffusers_compress.coding.text import vocabulary_of
from diffusers_compress.contract import TEXT_SKETCH
from diffusers_compress.diffusion import solvers
from diffusers_compress.diffusion.families.common import scale_factor_of
from diffusers_compress.diffusion.realism import dial
from diffusers_compress.errors import Corrupt, WrongModel
from diffusers_compress.format.container import Header
from diffusers_compress.latent_pipeline import LatentCodecMixin
from diffusers_compress.models import adapter
from diffusers_compress.outputs import CompressOutput, DecompressOutput
from diffusers_compress.pipeline import Decoding, Rate, Watch, compressed


class TextSketchPipeline(LatentCodecMixin, DiffusionPipeline):
    """Image codec for hundreds of bytes and less, from Stable Diffusion and, for sketches, a ControlNet.

    `from_pretrained` takes a Stable-Diffusion folder or Hub id, to which `controlnet=` adds a `ControlNetModel` for lines or soft edges, or
    a folder as `examples/train_sketch_controlnet.py` writes it. `compress` gives whole files as bytes, `decompress` gives pictures,
    calling the pipeline does both.

    Args:
        vae, text_encoder, tokenizer, unet, scheduler: as in `StableDiffusionPipeline`.
        controlnet: sees the sketch in three channels, or the sketch and the thumbnail's colours in four; without one files have no sketch.

    Examples:
        >>> from PIL import Image
        >>> from diffusers_compress import TextSketchPipeline, embedded_model
        >>> pipe = TextSketchPipeline.from_pretrained(embedded_model("text-sketch"))
        >>> image = Image.radial_gradient("L").convert("RGB")
        >>> both = pipe(image, num_inference_steps=2)
        >>> len(both.bitstreams[0]) < 300, both.images[0].size
        (True, (256, 256))
    """

    model_cpu_offload_seq = "text_encoder->controlnet->unet->vae"
    _optional_components = ["controlnet"]

    def __init__(
        self,
        vae: AutoencoderKL | AutoencoderDC,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
        controlnet: ControlNetModel | None = None,
    ):
        super().__init__()
        self.register_modules(vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler)
        self.register_modules(controlnet=controlnet)
        self.vae_scale_factor = scale_factor_of(vae)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **options) -> Self:
        """As diffusers', and takes a folder that holds a ControlNet and names the model under it."""
        folder = adapter.find(pretrained_model_name_or_path, **options)
        if folder is None:
            return super().from_pretrained(pretrained_model_name_or_path, **options)
        options.pop("revision", None)
        if options.get("controlnet") is None:
            dtype = adapter.dtype_of(options, "controlnet")
            options["controlnet"] = ControlNetModel.from_pretrained(folder, subfolder="controlnet", torch_dtype=dtype)
        return super().from_pretrained(adapter.base_of(folder), **options)

    # ------------------------------------------------------------------------------------------------------ public calls

    def compress(
        self,
        image: PipelineImageInput,
        prompt: str | Sequence = "",
        captioner: Callable | None = None,
        sketch_size: int | None = None,
        levels: int = 2,
        threshold: float = 0.4,
        detector: Callable = canny,
        thumbnail_size: int = thumbnail.SIDE,
        candidates: int = 1,
        similarity: Callable = structure,
        decoding: dict | None = None,
        seed: int = 0,
        batch_size: int = 8,
        **rate: Unpack[Rate],
    ) -> CompressOutput:
        """Pictures to files. Where a file would be larger than it may be, it has fewer lines.

        Args:
            image: one or a list, of any sizes: PIL pictures, numpy arrays [H, W, C] or tensors [C, H, W] (see `images.to_tensor`).
            prompt: one for all or a list with one for each picture: a text, or a list of token ids of the model's tokenizer.
            captioner: makes the prompts instead: a function from a list of PIL pictures to texts or lists of ids, such as
                `captions.load_captioner` gives.
            sketch_size: cells along the sketch's longer side, up to 512, 0 for no sketch; default: 128 if there is a ControlNet.
            levels: 2 to 8, of a cell: 2 for lines, more for soft edges.
            threshold: in (0, 1], strength of the weakest lines.
            detector: a function from a picture [rows, columns, 3] in [0, 1], already as small as the sketch, to strengths in [0, 1].
            thumbnail_size: cells along the longer side of the thumbnail, up to 32, 0 for none: colours are then the model's.
            candidates: pictures that are painted here, with the seeds from `seed` on; the file has the seed of the best.
            similarity: function of two PIL pictures that says which is the best, such as `inversion.load_similarity` gives for CLIP.
            decoding: arguments of `decompress` that the receiver will use, for the candidates.
            seed: of the noise that a decoder starts from, 0 to 2**32 - 1; stored in the file.
            batch_size: of no effect. Pictures are painted one by one, since the size of a batch changes them.
            rate: `target_bpp` or `max_bytes`, which no file may exceed; neither need be given.

        Raises:
            ValueError: for an argument out of its range, or a file that is too large even without a sketch.
        """
        sketch_size = (128 if self.controlnet else 0) if sketch_size is None else sketch_size
        drawing = Drawing(sketch_size, levels, threshold, detector, thumbnail_size)
        if sketch_size and not self.controlnet:
            raise ValueError("a sketch needs a ControlNet: give from_pretrained one (controlnet=...), or sketch_size=0")
        check_positive("candidates", candidates)
        seeds = range(seed, seed + candidates)
        if seed < 0 or seeds[-1] > MAX_SEED:
            raise ValueError(f"seeds must be from 0 to {MAX_SEED}, not {seed} to {seeds[-1]}")
        pictures = self.read_pictures(TEXT_SKETCH, image, **rate)
        originals = [images.to_output(picture.x[None])[0] for picture in pictures]
        if captioner is not None and prompt:
            raise ValueError("give prompt or captioner, not both")
        prompts = [prompt] * len(pictures) if isinstance(prompt, str) else prompt
        prompts = captioner(originals) if captioner else prompts
        if len(prompts) != len(pictures):
            raise ValueError(f"{len(prompts)} prompts were given for {len(pictures)} pictures")

        files = []
        with self.labelled_bar("pictures", len(pictures)) as bar:
            for picture, text, original in zip(pictures, prompts, originals):
                ids = self.ids_of(text, picture.notes)
                largest = file_of(picture.header, picture.x, ids, drawing, seeds[-1], picture.max_bytes)
                made = [reseeded(largest, each) for each in seeds]
                if candidates > 1:
                    likeness = [similarity(original, self.decompress(data, **decoding or {}).images[0]) for data in made]
                    made = [made[likeness.index(max(likeness))]]
                files.append(made[0])
                bar.update()
        return compressed(files, pictures)

    def decompress(
        self,
        bitstreams: bytes | list[bytes],
        num_inference_steps: int = 25,
        guidance_scale: float = 9.0,
        controlnet_conditioning_scale: float = 1.0,
        control_guidance_end: float = 1.0,
        strength: float = 0.9,
        realism: float = 1.0,
        **shared: Unpack[Decoding],
    ) -> DecompressOutput:
        """Files to pictures of their original sizes, one by one.

        Args:
            bitstreams: one file or a list.
            num_inference_steps: network calls; published: 25.
            guidance_scale: above 1, guidance towards the file's prompt; the sketch stays in both branches. Published: 9.
            controlnet_conditioning_scale: weight of the sketch.
            control_guidance_end: in [0, 1], part of the noise levels, from the noisiest on, at which the ControlNet is asked.
            strength: in (0, 1], noise level that the walk starts from, over the thumbnail if there is one; 1: noise alone.
            realism: in [0, 1], see `diffusion.realism`.
            shared: `limits` and others that every codec takes, see `contract.ImageCodec.decompress`; `batch_size` is of no effect.

        Raises:
            BitstreamError: `NotABitstream`, `UnsupportedVersion`, `Corrupt`, `WrongModel`, `LimitExceeded`.
            ValueError: for an argument out of its range.
        """
        check_walk(num_inference_steps, realism)
        scale, end = controlnet_conditioning_scale, control_guidance_end
        painting = Painting(num_inference_steps, guidance_scale, scale, end, strength, realism)
        files, pictures = self.read_files(read_file, bitstreams, **shared), []
        contents = [self.read_content(*content) for content in files.contents]
        for (header, parameters, _), content in zip(files.contents, contents):
            x = self.paint(header, parameters, content, painting, files.watch)[None]
            pictures += self.pictures_of(x, [header], files.output_type)
        return DecompressOutput(images=pictures, notes=files.notes)

    # ------------------------------------------------------------------------------------------------------------ steps

    def ids_of(self, prompt: str | Sequence[int], notes: list[str]) -> list[int]:
        """The token ids of a text, or what was given, as many as the model sees. ValueError for ids that the tokenizer does not have."""
        ids = list(prompt)
        if isinstance(prompt, str):
            ids = self.tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
        if unknown := [number for number in ids if number not in range(len(self.tokenizer))]:
            raise ValueError(f"the prompt holds token {unknown[0]}, the tokenizer has {len(self.tokenizer)}")
        seen = self.tokenizer.model_max_length - 2
        if len(ids) > seen:
            notes.append(f"of the prompt's {len(ids)} tokens the first {seen} are stored: the model sees no more")
        return ids[:seen]

    def read_content(self, header: Header, parameters: Parameters, data: bytes) -> Content:
        """What a file says. WrongModel if this model lacks what the file needs."""
        if parameters.side and not self.controlnet:
            raise WrongModel("the file holds a sketch, for which this model has no ControlNet; load it with the file's own")
        content = payload.decode(data, parameters, header.height, header.width)
        longest = self.tokenizer.model_max_length - 2
        if len(content.ids) > longest or any(number >= len(self.tokenizer) for number in content.ids):
            raise Corrupt("the file's prompt has tokens that the tokenizer does not have, or too many; fetch it again")
        return content

    def paint(self, header: Header, parameters: Parameters, content: Content, painting: Painting, watch: Watch = None) -> Tensor:
        """A picture [3, H, W], about [-1, 1], of what a file says."""
        noise, size = self.noise_schedule(), (header.height, header.width)
        shape, start = self.latent_shape(*size), noise.alpha.numel() - 1
        x_t = randomness.normals(math.prod(shape), randomness.START, parameters.seed).reshape(1, *shape)
        sketch = None if content.sketch is None else spread(content.sketch, parameters.levels, *size)
        colours = None if content.thumbnail is None else thumbnail.dequantize(content.thumbnail)
        if colours is not None:
            start = round(painting.strength * start)
            alpha, sigma = noise.level(start)
            x_0 = self.encode_picture(self.pad(enlarged(colours, *size).clamp(-1, 1))[None])
            x_t = alpha * x_0 + sigma * x_t.to(x_0.device)
        walk = solvers.solve(x_t.to(self._execution_device), start, painting.num_inference_steps, noise, self.scheduler)
        walk = dial(walk, painting.realism, noise)
        seen = conditioning_of(self, sketch, colours, size, painting)
        x_0 = self.run([walk], [content.ids], painting.guidance_scale, watch, extra_conditioning=seen)[0]
        x = images.crop(self.decode_latent(x_0)[0], *size).cpu()
        return x if colours is None else recoloured(x, colours)

    @property
    def family(self) -> ControlledStableDiffusion:
        """Stable Diffusion's, but that prompts are token ids, and a ControlNet is asked."""
        return ControlledStableDiffusion(self)

    def fingerprint(self, fused: bool = False) -> bytes:
        """Four bytes that tell this model from others, its tokenizer's vocabulary and its ControlNet included."""
        return super().fingerprint(own_config={"vocabulary": vocabulary_of(self.tokenizer).identity}, fused=fused)
