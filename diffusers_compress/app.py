"""A page to try the codecs in a browser: a photo to a file, and a file to a picture. `diffusers-compress app` starts it; `app/` is a Space."""

import io
import os
import tempfile
import threading
import traceback
from collections.abc import Callable
from functools import lru_cache, wraps
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from diffusers_compress import images
from diffusers_compress.codecs import codec_of, describe, lossy_part
from diffusers_compress.contract import CODECS, DEFAULT
from diffusers_compress.format import container
from diffusers_compress.format.limits import Limits

PHOTO = Path(__file__).parent / "embedded" / "coffee.jpg"
MAX_UPLOAD = 32 * 2**20  # bytes
MAX_READ = 64_000_000  # pixels of a photo that is opened at all
MAX_CODED = 1_000_000  # pixels that are coded; larger photos are made smaller
CANVAS = 512  # pixels, the longer side of the picture that is painted on
CLEANED = (60, 900)  # seconds: how often old files are looked for, and how old they are
ABOUT = """# Photos in a few kilobytes
The codecs of `diffusers_compress` with {model}. The left of the slider is your photo, the right what the file holds.
Files are deleted after a quarter of an hour."""


class Refused(ValueError):
    """What was uploaded cannot be taken, in one line for whoever uploaded it."""


def coders() -> dict[str, str]:
    """Name, as people read it -> key in `CODECS`, of the codecs that take a rate."""
    return {row.name: key for key, row in CODECS.items() if row.rate == "required"}


def takes_regions(coder: str) -> bool:
    """Whether the codec of this name can spend its bytes where the brush was."""
    return CODECS[coders()[coder]].regions


class Engine:
    """The pipelines behind the page, loaded when they are first asked for; one call at a time.

    Args:
        model: folder or Hub id; None: each codec's embedded model.
        device: of the pipelines.
        dtype: of their weights.
        max_pixels: that are coded or decoded.
    """

    def __init__(self, model: str | None = None, device: str = "cpu", dtype: str = "float32", max_pixels: int = MAX_CODED):
        self.model, self.device, self.dtype = model, device, getattr(torch, dtype)
        self.max_pixels, self.limits = max_pixels, Limits(pixels=max_pixels)
        self.alone = threading.Lock()
        self.pipeline = lru_cache(len(CODECS))(self.load)
        self.preview = lru_cache(64)(self.preview_of)

    def load(self, codec: str, preset: str | None = None) -> Any:
        """The pipeline of a codec; `preset`: of a model with several rates, the one that a file was made with."""
        row = CODECS[codec]
        options = {"preset": preset} if row.presets else {}
        pipe = row.pipeline_class().from_pretrained(self.model or row.embedded_model(), dtype=self.dtype, **options)
        pipe.set_progress_bar_config(disable=True)
        return pipe.to(self.device)

    def read_photo(self, path: str | None) -> tuple[Image.Image, list[str]]:
        """A photo as it is coded, 8-bit sRGB and small enough, and notes. Refused if it is none."""
        if path is None:
            raise Refused("choose a photo first")
        data = Path(path).read_bytes()
        if not data:
            raise Refused("this file is empty")
        try:
            with Image.open(io.BytesIO(data)) as opened:  # decodes nothing yet
                width, height = opened.size
        except Image.DecompressionBombError:
            raise Refused(f"this picture has more than {MAX_READ:,} pixels") from None
        except Exception:  # Pillow's readers raise many kinds for broken files
            raise Refused("this is no picture that can be read") from None
        if width * height > MAX_READ:
            raise Refused(f"this picture has {width}x{height} pixels, more than {MAX_READ:,}")
        image = images.read_image(data)
        scale = (self.max_pixels / (width * height)) ** 0.5
        notes = []
        if scale < 1:
            size = max(1, int(width * scale)), max(1, int(height * scale))
            notes.append(f"made smaller, from {width}x{height} pixels")
            x, more = images.to_tensor(image)
            image = images.to_output(x[None])[0].resize(size, Image.Resampling.LANCZOS)
        else:
            x, more = images.to_tensor(image)
            image = images.to_output(x[None])[0]
        return image, notes + more

    def canvas(self, path: str | None) -> Image.Image | None:
        """The photo, small, to paint on; None if it cannot be read, which `encode` says."""
        try:
            image, _ = self.read_photo(path)
        except ValueError:
            return None
        image.thumbnail((CANVAS, CANVAS))
        return image

    def encode(
        self, path: str | None, coder: str, bpp: float, painted: str | None = None
    ) -> tuple[Image.Image, bytes, list[str]]:
        """(the photo as it was coded, its file, notes). `painted`: path of a picture that is transparent where the brush was not."""
        image, notes = self.read_photo(path)
        mask = read_mask(painted, image.size) if painted else None
        options = {"importance": mask} if mask and takes_regions(coder) else {}
        if mask and not options:
            notes.append(f"{coder} has no regions, so the brush counts for nothing")
        with self.alone:
            return image, self.pipeline(coders()[coder]).compress(image, target_bpp=bpp, **options).bitstreams[0], notes

    def read_file(self, path: str | None) -> bytes:
        """A compressed file. Refused if it is too large to be one that this page would decode."""
        if path is None:
            raise Refused("choose a .dfc file first")
        if os.path.getsize(path) > 4 * self.max_pixels:
            raise Refused(f"this file is larger than {4 * self.max_pixels:,} bytes")
        data = Path(path).read_bytes()
        describe(data, self.limits)  # BitstreamError in one line
        return data

    def decode(self, data: bytes, realism: float | None = None) -> Image.Image:
        """The picture of a file; `realism` where its codec has that dial."""
        codec, facts = codec_of(data, self.limits), describe(data, self.limits)
        with self.alone:
            pipe = self.pipeline(codec, facts.get("preset"))
            has_dial = "realism" in signature(pipe.decompress).parameters
            options = {"realism": realism} if has_dial and realism is not None else {}
            return pipe.decompress(data, limits=self.limits, **options).images[0]

    def preview_of(self, data: bytes) -> Image.Image:
        """The quick picture of a file, whole or cut. `preview` remembers those of late."""
        codec, facts = codec_of(data, self.limits), describe(data, self.limits)
        with self.alone:
            return (
                self.pipeline(codec, facts.get("preset")).decompress(data, limits=self.limits, **CODECS[codec].preview).images[0]
            )

    def prefix(self, data: bytes, share: float) -> tuple[Image.Image, int, dict]:
        """(preview of the file's beginning, its bytes, its facts): of `share` percent, no longer than the whole steps in it."""
        start = container.read_header(data, self.limits)[1]
        cut = data[: max(start, round(len(data) * share / 100))]
        facts = describe(cut, self.limits)
        return self.preview(self.whole_steps(cut, facts["steps_present"])), len(cut), facts

    def whole_steps(self, cut: bytes, steps: int) -> bytes:
        """The shortest beginning with as many whole steps: all cuts between two steps are one preview."""
        low, high = container.read_header(cut, self.limits)[1], len(cut)
        while low < high:
            middle = (low + high) // 2
            if describe(cut[:middle], self.limits)["steps_present"] >= steps:
                high = middle
            else:
                low = middle + 1
        return cut[:high]


def read_mask(path: str, size: tuple[int, int]) -> Image.Image | None:
    """What was painted on `Engine.canvas`, as a mask of a picture of this size; None if nothing was. Refused if it is no such picture."""
    try:
        with Image.open(path) as opened:  # decodes nothing yet
            if max(opened.size) > CANVAS:
                raise Refused(f"what was painted has {opened.width}x{opened.height} pixels, more than {CANVAS}x{CANVAS}")
            mask = opened.convert("RGBA").getchannel("A")
    except Refused:
        raise
    except Exception:  # Pillow's readers raise many kinds for broken files
        raise Refused("what was painted cannot be read") from None
    return mask.resize(size) if mask.getbbox() else None


def size_line(data: bytes, image: Image.Image) -> str:
    """Bytes and bits per pixel, of the file itself."""
    return f"**{len(data):,} bytes**, {8 * len(data) / (image.width * image.height):.4f} bits per pixel, {image.width}x{image.height} pixels"


def one_line(error: BaseException) -> str:
    """What is shown of an error."""
    text = str(error).strip().partition("\n")[0]
    if isinstance(error, ValueError | OSError) and text and not getattr(error, "filename", None):
        return text
    if isinstance(error, MemoryError) or "out of memory" in text.lower():
        return "out of memory: try a smaller picture"
    return f"this did not work ({type(error).__name__})"


def in_one_line(function: Callable) -> Callable:
    """The function, whose errors reach the page as one line, and the log whole if they are no refusal."""
    import gradio

    @wraps(function)
    def told(*arguments):
        try:
            return function(*arguments)
        except Exception as error:  # noqa: BLE001 - the page goes on
            if not isinstance(error, ValueError):
                traceback.print_exc()
            raise gradio.Error(one_line(error), print_exception=False) from None

    return told


def on_gpu(function: Callable) -> Callable:
    """On a Space with ZeroGPU: a GPU for the time of a call."""
    try:
        import spaces
    except ImportError:
        return function
    return spaces.GPU(duration=120)(function)


def save_file(data: bytes) -> str:
    """The path of a temporary `.dfc` file, which gradio copies into its own folder and forgets."""
    folder = tempfile.mkdtemp(prefix="dfc-")
    path = Path(folder, "photo.dfc")
    path.write_bytes(data)
    return str(path)


def brush() -> Any:
    """An editor to paint on a picture, a `gradio.ImageEditor`. What a function gets of it is the path of its layer, or None.

    gradio itself would decode whatever is uploaded as a layer, of any size, and keep in memory what is sent to `accept_blobs`. Both are
    replaced in this one object: of a subclass gradio would write a file beside this one.
    """
    import gradio as gr

    editor = gr.ImageEditor(
        label="Brush",
        show_label=False,
        sources=(),
        transforms=(),
        layers=False,
        brush=gr.Brush(colors=["#ff3b30"], color_mode="fixed", default_size=CANVAS // 16),
        eraser=gr.Eraser(default_size=CANVAS // 16),
        buttons=[],
        format="png",
        placeholder="Choose a photo first",
        canvas_size=(CANVAS, CANVAS),
    )
    editor.preprocess = lambda drawn: drawn.layers[0].path if drawn and drawn.layers else None
    editor.accept_blobs = None
    return editor


def build(engine: Engine) -> Any:
    """The page, a `gradio.Blocks`."""
    import gradio as gr

    def compress(path, coder, bpp, realism, painted):
        image, data, notes = engine.encode(path, coder, bpp, painted)
        decoded = engine.decode(data, realism)
        lines = [size_line(data, image), *(f"Note: {note}." for note in notes)]
        return (image, decoded), "\n\n".join(lines), gr.DownloadButton(value=save_file(data), interactive=True), (image, data)

    def again(made, realism):
        if made is None:
            return gr.skip()
        return made[0], engine.decode(made[1], realism)

    def decompress(path, realism):
        data = engine.read_file(path)
        facts, picture = describe(data, engine.limits), engine.decode(data, realism)
        progressive = "steps_present" in facts and lossy_part(data, engine.limits) is None
        facts["bpp"] = round(facts["bpp"], 4)
        return picture, size_line(data, picture), facts, gr.Slider(value=100, visible=bool(progressive)), data

    def begin(data, share):
        if data is None:
            return gr.skip()
        picture, size, facts = engine.prefix(data, share)
        return picture, f"Preview of the first **{size:,} bytes**: {facts['steps_present']} of {facts['steps']} steps"

    def offer_brush(coder):
        return gr.Column(visible=takes_regions(coder) or "hidden"), gr.Markdown(visible=not takes_regions(coder))

    model = "the model `" + engine.model + "`" if engine.model else "the small models that come with the package"
    once = {"concurrency_id": "model", "concurrency_limit": 1}
    with gr.Blocks(title="diffusers_compress", delete_cache=CLEANED, analytics_enabled=False) as page:
        gr.Markdown(ABOUT.format(model=model))
        with gr.Tab("Photo to file"):
            made = gr.State(time_to_live=CLEANED[1])
            with gr.Row():
                with gr.Column(scale=1):
                    photo = gr.File(label="Photo", file_types=["image"], height=120)
                    gr.Examples([[str(PHOTO)]], [photo], label="Or this one (Rachel Michetti, CC0)")
                    coder = gr.Radio(list(coders()), value=CODECS[DEFAULT].name, label="Codec")
                    bpp = gr.Slider(0.03, 1, 0.15, step=0.01, label="Bits per pixel, at most")
                    dial = gr.Slider(0, 1, 0.5, step=0.05, label="Realism: 0 least error, 1 natural texture")
                    with gr.Column() as paints, gr.Accordion("Brush: where the bytes go", open=False):
                        gr.Markdown("Choose a photo and paint what matters most. The rest is coarser, and the file no larger.")
                        painted = brush()
                    plain = gr.Markdown("This codec has no brush: the base file that it stores knows no regions.", visible=False)
                    compress_button = gr.Button("Compress", variant="primary")
                with gr.Column(scale=2):
                    both = gr.ImageSlider(label="Photo | decoded from the file", format="png", interactive=False, max_height=640)
                    told = gr.Markdown()
                    download = gr.DownloadButton("Download the file", interactive=False)
            compress_button.click(
                in_one_line(on_gpu(compress)),
                [photo, coder, bpp, dial, painted],
                [both, told, download, made],
                **once,
                api_name="compress",
            )
            photo.change(in_one_line(engine.canvas), photo, painted, api_name=False)
            coder.change(offer_brush, coder, [paints, plain], queue=False, show_progress="hidden", api_name=False)
            dial.release(in_one_line(on_gpu(again)), [made, dial], both, **once, api_name=False)
        with gr.Tab("File to picture"):
            opened = gr.State(time_to_live=CLEANED[1])
            with gr.Row():
                with gr.Column(scale=1):
                    file = gr.File(label="A .dfc file", height=120)
                    dial = gr.Slider(0, 1, 0.5, step=0.05, label="Realism: 0 least error, 1 natural texture")
                    decompress_button = gr.Button("Decompress", variant="primary")
                with gr.Column(scale=2):
                    picture = gr.Image(label="Picture", format="png", interactive=False)
                    size = gr.Markdown()
                    share = gr.Slider(1, 100, 100, step=1, label="Percent of the file, from its beginning", visible=False)
                    with gr.Accordion("What the file says", open=False):
                        facts = gr.JSON(show_label=False, max_height=320)
            decompress_button.click(
                in_one_line(on_gpu(decompress)),
                [file, dial],
                [picture, size, facts, share, opened],
                **once,
                api_name="decompress",
            )
            share.release(in_one_line(on_gpu(begin)), [opened, share], [picture, size], **once, api_name=False)
    return page.queue(max_size=20)


def serve(page: Any, **options: Any) -> Any:
    """Start the page; `options` are those of gradio's `launch`."""
    return page.launch(max_file_size=MAX_UPLOAD, allowed_paths=[str(PHOTO)], **options)
