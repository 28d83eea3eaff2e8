"""Makes the golden files: for every codec and channel small .dfc files with the picture and the symbols that they decode to.

    python tests/golden/make.py            those that are missing; what is there stays, until the format's version changes
    python tests/golden/make.py --again    all of them, while that version is unreleased

`golden.json` holds for each file how it was made, the exact symbols, and by how much a decoder's picture may differ from the PNG: `rms` and
`peak`, in 8-bit levels. The models are the embedded ones, and tiny ones whose weights come from the package's own counter-based generator, so
that they are the same with every version of torch. A file that was released is never made again: it is what the format means.
"""

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parents[1]))

from diffusers_compress import (  # noqa: E402
    CDCContextModel,
    CDCPipeline,
    CDCScheduler,
    CDCUNet,
    DiffCPipeline,
    HyperEncoder,
    HyperPrior,
    PerCoPipeline,
    RefinePipeline,
    RelicPipeline,
    TextSketchPipeline,
    UQDMNetwork,
    UQDMPipeline,
    UQDMScheduler,
    embedded_model,
)
from diffusers_compress.codecs import lossy_part
from diffusers_compress.codecs.cdc import format as cdc_format  # noqa: E402
from diffusers_compress.codecs.diffc import format as diffc_format  # noqa: E402
from diffusers_compress.codecs.diffc import rate  # noqa: E402
from diffusers_compress.codecs.diffc.timesteps import timesteps_of  # noqa: E402
from diffusers_compress.codecs.perco import format as perco_format  # noqa: E402
from diffusers_compress.codecs.refine import format as refine_format  # noqa: E402
from diffusers_compress.codecs.relic import format as relic_format  # noqa: E402
from diffusers_compress.codecs.relic.quantizer import Quantizer  # noqa: E402
from diffusers_compress.codecs.text_sketch import format as text_sketch_format  # noqa: E402
from diffusers_compress.codecs.uqdm import format as uqdm_format  # noqa: E402
from diffusers_compress.codecs.uqdm import loop as uqdm_loop
from diffusers_compress.coding import randomness  # noqa: E402
from diffusers_compress.coding.text import ALPHABET  # noqa: E402
from diffusers_compress.diffusion.schedule import from_pure_noise  # noqa: E402
from diffusers_compress.format import container  # noqa: E402
from diffusers_compress.format.limits import DEFAULT_LIMITS  # noqa: E402
from diffusers_compress.models import adapter  # noqa: E402

PIPELINES = {
    "cdc": CDCPipeline,
    "diffc": DiffCPipeline,
    "perco": PerCoPipeline,
    "refine": RefinePipeline,
    "relic": RelicPipeline,
    "text-sketch": TextSketchPipeline,
    "uqdm": UQDMPipeline,
}
WEIGHTS = 0x676F6C64  # a stream of the generator that no file uses: "gold"
RMS, PEAK = 1.0, 6  # permitted, in 8-bit levels
PREVIEW = {  # one network call
    "cdc": {"num_inference_steps": 1},
    "diffc": {"reconstruction": "denoised"},
    "perco": {"num_inference_steps": 1, "guidance_scale": 1.0},
    "refine": {"num_inference_steps": 1},
    "relic": {"num_inference_steps": 1},
    "text-sketch": {"num_inference_steps": 1, "guidance_scale": 1.0},
    "uqdm": {"reconstruction": "denoised"},
}
DITHERED = {"rounding": "dithered"}

# name: (codec, model, size of the picture, options of compress, options of decompress, bytes that are left of the file or None)
CASES = {
    "diffc-trellis": ("diffc", "epsilon", (48, 32), {"coder": "trellis", "max_bytes": 150, "prompt": "a house"}, {}, None),
    "diffc-trellis-cut": ("diffc", "epsilon", (48, 32), {"coder": "trellis", "max_bytes": 150, "prompt": "a house"}, {}, 90),
    "diffc-trellis-1x1": ("diffc", "epsilon", (1, 1), {"coder": "trellis", "max_bytes": 40}, {}, None),
    "diffc-trellis-check": ("diffc", "v_prediction", (40, 56), {"coder": "trellis", "max_bytes": 200, "num_coding_steps": 6}, {}, None),
    "diffc-trellis32": ("diffc", "v_prediction", (33, 31), {"max_bytes": 120, "coder": "trellis32"}, {}, None),
    "diffc-poisson": ("diffc", "epsilon", (48, 32), {"max_bytes": 100, "coder": "poisson"}, {}, None),
    "diffc-embedded": ("diffc", "embedded", (64, 48), {"coder": "trellis", "max_bytes": 120, "prompt": "a beach"}, {}, None),
    "diffc-embedded-preview": ("diffc", "embedded", (64, 48), {"coder": "trellis", "max_bytes": 60}, {"reconstruction": "denoised"}, None),
    "relic-adaptive": ("relic", "epsilon", (72, 40), {"max_bytes": 250, "prompt": "a house", **DITHERED, "entropy_model": "adaptive"}, {}, None),
    "relic-adaptive-plain": ("relic", "v_prediction", (48, 32), {"max_bytes": 180, "entropy_model": "adaptive"}, {}, None),
    "relic-hyperprior": ("relic", "v_prediction", (48, 32), {"max_bytes": 150, **DITHERED}, {"realism": 0.5}, None),
    "relic-hyperprior-plain": ("relic", "epsilon", (9, 130), {"max_bytes": 130}, {}, None),
    "relic-map": ("relic", "v_prediction", (72, 40), {"max_bytes": 200, "importance": [[8, 16, 40, 32], [60, 0, 72, 40]]}, {}, None),
    "relic-embedded": ("relic", "embedded", (64, 48), {"max_bytes": 200}, {}, None),
    "relic-embedded-preview": ("relic", "embedded", (64, 48), {"max_bytes": 80}, {"preview": True}, None),
    "perco-words": ("perco", "epsilon", (72, 56), {"prompt": "A house, on a hill!"}, {}, None),
    "perco-bytes": ("perco", "v_prediction", (40, 24), {"prompt": "Größe 7 🙂", "seed": 5}, {}, None),
    "perco-no-caption": ("perco", "epsilon", (9, 33), {}, {}, None),
    "uqdm-lossless": ("uqdm", "epsilon", (24, 16), {"lossless": True}, {}, None),
    "uqdm-tiles": ("uqdm", "v_prediction", (40, 21), {"num_coding_steps": 2}, {"reconstruction": "denoised"}, None),
    "uqdm-cut": ("uqdm", "epsilon", (17, 9), {"num_coding_steps": 3}, {}, 150),
    "uqdm-1x1": ("uqdm", "v_prediction", (1, 1), {"lossless": True}, {}, None),
    "diffc-lossless": ("diffc", "epsilon", (21, 17), {"coder": "trellis", "max_bytes": 100, "lossless": True}, {}, None),
    "cdc-levels": ("cdc", "epsilon", (72, 40), {"max_bytes": 400}, {}, None),
    "cdc-preview": ("cdc", "epsilon", (33, 70), {"fidelity": 0.4}, {"preview": True}, None),
    "cdc-published": ("cdc", "v_prediction", (40, 21), {"seed": 7}, {"gamma": 0.0}, None),
    "cdc-1x1": ("cdc", "v_prediction", (1, 1), {}, {}, None),
    "refine-jpeg": ("refine", "epsilon", (72, 40), {"fidelity": 0.1, "prompt": "a house", "seed": 5}, {}, None),
    "refine-webp": ("refine", "v_prediction", (33, 31), {"max_bytes": 250, "base": "webp"}, {"realism": 0.5}, None),
    "refine-avif-preview": ("refine", "embedded", (64, 48), {"max_bytes": 600, "base": "avif"}, {"preview": True}, None),
    "text-sketch": ("text-sketch", "epsilon", (72, 40), {"prompt": "a house", "seed": 5, "threshold": 0.1}, {}, None),
    "text-sketch-levels": ("text-sketch", "v_prediction", (33, 70), {"sketch_size": 20, "levels": 5, "threshold": 0.2}, {}, None),
    "text-sketch-ids": ("text-sketch", "v_prediction", (48, 32), {"prompt": [list(range(16))], "sketch_size": 0, "thumbnail_size": 0}, {}, None),
    "text-sketch-1x1": ("text-sketch", "epsilon", (1, 1), {}, {}, None),
    "refine-embedded": ("refine", "embedded", (64, 48), {"max_bytes": 700}, {}, None),
    "refine-trained": ("refine", "trained", (64, 48), {"max_bytes": 700}, {}, None),
}  # fmt: skip

# -------------------------------------------------------------------------------------------------------------------- models


def filled(module, number):
    """The module with weights from the generator: normal, with the variance 1 / fan-in; norms near 1, biases near 0."""
    for k, (name, parameter) in enumerate(sorted(module.named_parameters())):
        numbers = randomness.normals(parameter.numel(), WEIGHTS, 1000 * number + k).view_as(parameter)
        if parameter.ndim > 1:
            weights = numbers / math.sqrt(parameter[0].numel())
        else:
            weights = numbers / 10 + (1 if "norm" in name and name.endswith("weight") else 0)
        parameter.data.copy_(weights)
    return module.eval()


def tokenizer(letters, merges):
    """A CLIP tokenizer that knows these letters, alone and at a word's end, and some merges of them."""
    from transformers import CLIPTokenizer

    tokens = [*letters, *(letter + "</w>" for letter in letters), *(merge.replace(" ", "") for merge in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
        Path(folder, "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
        return CLIPTokenizer.from_pretrained(folder, model_max_length=77, pad_token="<|endoftext|>")


LOWER_CASE = [chr(code) for code in range(ord("a"), ord("z") + 1)]
MERGES = ["h o", "ho u", "hou s", "hous e</w>", "o n</w>", "h i", "hi l", "hil l</w>"]


def components(prediction_type, words=None):
    """Stable Diffusion in miniature; `words`: its tokenizer, of the lower-case letters by default."""
    words = words or tokenizer(LOWER_CASE, [])
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=64,
    )
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=16,
        sample_size=8,
    )
    text_config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=len(words) - 2,
        eos_token_id=len(words) - 1,
        pad_token_id=len(words) - 1,
    )
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    return {
        "vae": filled(vae, 0),
        "unet": filled(unet, 1),
        "text_encoder": filled(CLIPTextModel(text_config), 2),
        "tokenizer": words,
        "scheduler": DDIMScheduler(**betas, prediction_type=prediction_type, clip_sample=False, set_alpha_to_one=False),
    }


def pipeline(codec, model):
    """The pipeline of a codec with one of the models "embedded", "trained" (what was trained over that), "epsilon" and "v_prediction"."""
    if model in ("embedded", "trained"):
        folder = embedded_model(codec) if model == "trained" else embedded_model()
        pipe = PIPELINES[codec].from_pretrained(folder, dtype=torch.float32)
    elif codec == "uqdm":
        pipe = UQDMPipeline(uqdm_network(model == "v_prediction"), UQDMScheduler(gamma_origin=-13.0))
    elif codec == "cdc":
        pipe = CDCPipeline(*cdc_networks(model == "v_prediction"), CDCScheduler(num_train_timesteps=100))
    else:
        words = tokenizer(ALPHABET, MERGES) if codec == "perco" else None  # numbered as CLIP's
        pipe = PIPELINES[codec](**components(model, words))
        if codec == "diffc":
            pipe.vae.register_to_config(scaling_factor=2.0)  # latents of some variance, so that files have steps
        if codec == "relic":
            prior = filled(HyperPrior(latent_channels=4, hidden=16), 3)
            prior.settle()
            pipe.register_modules(hyperprior=prior)
        if codec == "text-sketch":
            pipe.register_modules(controlnet=controlnet(pipe.unet, 4 if model == "v_prediction" else 3))
        if codec == "perco":
            pipe.register_modules(hyper_encoder=hyper_encoder())
            adapter.widen(pipe.unet, 8)
            weight = pipe.unet.conv_in.weight
            weight.data[:, 4:] = randomness.normals(weight[:, 4:].numel(), WEIGHTS, 4999).view_as(weight[:, 4:]) / 2
    pipe.set_progress_bar_config(disable=True)
    return pipe


def controlnet(unet, channels):
    """That sees sketches, and with four channels thumbnails."""
    from diffusers import ControlNetModel

    found = ControlNetModel.from_unet(
        unet, conditioning_channels=channels, conditioning_embedding_out_channels=(4, 4, 8, 8), load_weights_from_unet=False
    )
    return filled(found, 8)


def uqdm_network(preconditioned):
    """For tiles of 16 x 16: as published but small, or with all that ours has beside that."""
    levels = 2 if preconditioned else 1
    network = UQDMNetwork(
        patch=2 if preconditioned else 1,
        preconditioned=preconditioned,
        sample_size=16,
        block_out_channels=(8,) * levels,
        down_block_types=("DownBlock2D",) * levels,
        up_block_types=("UpBlock2D",) * levels,
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
    )
    return filled(network, 5)


def cdc_networks(published):
    """As published but small, or with all that ours have beside that."""
    ours = {"patch": 2, "levels": 6, "log_scales": True, "preview": True}
    context_model = CDCContextModel(
        widths=(8, 8, 16),
        hyper_widths=(8, 8, 4),
        context_channels=8 if published else 16,
        kernel=7 if published else 3,
        **({} if published else ours),
    )
    unet = CDCUNet(
        widths=(8, 8, 8),
        context_widths=(context_model.config.context_channels, 8, 8),
        blocks=2 if published else 1,
        kernel=7 if published else 3,
        attention=published,
        **({} if published else {"patch": 2, "rate_input": True, "centred": True}),
    )
    filled(context_model, 6), filled(unet, 7)
    context_model.z_index.data.fill_(16 / 64)
    context_model.hyper_decoder[-1].bias.data[16:] += 1  # scales above 0
    if not published:
        context_model.log2_gain.data += torch.tensor([[-1.0], [3.0]])
    context_model.settle()
    return context_model, unet


def hyper_encoder():
    """Its integers follow from numbers that float32 holds exactly."""
    found = filled(HyperEncoder(4, 1, 64, width=16, out_channels=8, codebook_dim=4), 4)
    found.settle(1 + torch.arange(64.0) % 7)
    return found


# --------------------------------------------------------------------------------------------------------------------- files


def picture(width, height):
    """Gradients, an edge and some texture."""
    y, x = np.mgrid[0:height, 0:width]
    planes = [90 + x + y, 220 - 2 * y, 120 + 40 * (x > 20)]
    noise = randomness.words(3 * width * height, WEIGHTS).numpy().reshape(height, width, 3) % 16
    return Image.fromarray((np.stack(planes, -1) + noise).clip(0, 255).astype(np.uint8))


def symbols(pipe, data):
    """What has to come out of a file exactly, whatever the machine, as plain values; of a lossless file in its lossy part."""
    data = lossy_part(data) or data
    if isinstance(pipe, DiffCPipeline):
        _, parameters, messages, _ = diffc_format.read_file(data)
        timesteps = timesteps_of(from_pure_noise(pipe.noise_schedule()), parameters)
        return {"timesteps": timesteps, "budgets": parameters.budgets, "messages": [message.tolist() for message in messages]}
    if isinstance(pipe, UQDMPipeline):
        sent, (header, parameters, sections, _) = [], uqdm_format.read_file(data)
        receiver = uqdm_loop.Receiver(parameters, sections, pipe.scheduler)

        def transmit(*step):
            sent.append(receiver.transmit(*step))
            return sent[-1]

        network, shape = pipe.tiled_network(8, None, pipe.progress_bar(total=0)), (3, header.height, header.width)
        steps = min(len(sections), len(parameters.sizes))
        uqdm_loop.chain(network, pipe.scheduler, shape, pipe.coding_device, steps, transmit)
        return {"k": [k.tolist() for k in sent], "nudge": parameters.nudge, "checks": parameters.checks}
    if isinstance(pipe, CDCPipeline):
        header, parameters, payload = cdc_format.read_file(data)
        y_hat = (512 * pipe.read_symbols(header, parameters, payload)).long()
        return {"level": parameters.level, "seed": parameters.seed, "y_hat": y_hat.flatten(1).tolist()}
    if isinstance(pipe, PerCoPipeline):
        header, parameters, payload = perco_format.read_file(data)
        shape = pipe.latent_shape(header.height, header.width)
        grid, caption = pipe.read_payload(payload, parameters, shape, DEFAULT_LIMITS)
        return {"grid": grid.tolist(), "caption": caption, "seed": parameters.seed}
    if isinstance(pipe, TextSketchPipeline):
        header, parameters, symbols = text_sketch_format.read_file(data)
        content = pipe.read_content(header, parameters, symbols)
        found = {"ids": content.ids, "seed": parameters.seed}
        grids = {"thumbnail": content.thumbnail, "sketch": content.sketch}
        return found | {name: grid if grid is None else grid.tolist() for name, grid in grids.items()}
    if isinstance(pipe, RefinePipeline):
        _, parameters, base = refine_format.read_file(data)
        return {"base": parameters.base, "errors": parameters.errors, "seed": parameters.seed, "bytes": len(base)}
    header, parameters, payload = relic_format.read_file(data)
    quantizer = Quantizer(parameters, pipe.statistics(), pipe.latent_shape(header.height, header.width))
    name = next(name for name, number in relic_format.MODEL_NUMBERS.items() if number == parameters.model)
    found = {"timestep": parameters.timestep, "v": pipe.entropy_model(name).receive(quantizer, payload).v.tolist()}
    return found | ({"levels": parameters.levels} if parameters.levels else {})


def decoded(pipe, data, options):
    """The picture of a file as an 8-bit array [H, W, 3]."""
    return np.asarray(pipe.decompress(data, **{"num_inference_steps": 3, **options}).images[0])


def make(name, pipe):
    """Write a case's .dfc and .png; its entry of golden.json."""
    codec, model, size, options, decoding, left = CASES[name]
    rate.CHECKED_BYTES = 0 if name.endswith("check") else 2000  # of itself so small a file has no check
    data = pipe.compress(picture(*size), **options).bitstreams[0][:left]
    (FOLDER / f"{name}.dfc").write_bytes(data)
    Image.fromarray(decoded(pipe, data, decoding)).save(FOLDER / f"{name}.png")
    return {"codec": codec, "model": model, "decompress": decoding, "rms": RMS, "peak": PEAK, "symbols": symbols(pipe, data)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--again", action="store_true", help="also those that are there, although the format's version is the same"
    )
    again, target = parser.parse_args().again, FOLDER / "golden.json"
    known = json.loads(target.read_text()) if target.exists() else {"version": None, "cases": {}}
    kept = known["cases"] if known["version"] == container.VERSION and not again else {}
    if kept.keys() == CASES.keys():
        sys.exit(f"the files of version {container.VERSION} of the format are there and stay as they are")
    pipes = {case[:2]: pipeline(*case[:2]) for name, case in CASES.items() if name not in kept}
    cases = {name: kept.get(name) or make(name, pipes[case[:2]]) for name, case in CASES.items()}
    rows = ",\n".join(f"{json.dumps(name)}: {json.dumps(case)}" for name, case in cases.items())
    target.write_text(f'{{"version": {container.VERSION}, "cases": {{\n{rows}\n}}}}\n')


if __name__ == "__main__":
    main()
