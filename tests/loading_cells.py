"""A fresh process that knows diffusers, a Hub and the package: loads each pipeline in every way that docs/loading.md promises.

Run by test_loading.py with folders and the pipeline files' folder; prints a line of JSON, cell -> the bytes that a photo became, or
what else a cell says.
"""

import json
import sys

import torch
from diffusers import DiffusionPipeline, PipelineQuantizationConfig, StableDiffusionPipeline
from PIL import Image

CLASSES = {"diffc": "DiffCPipeline", "relic": "RelicPipeline", "perco": "PerCoPipeline"}
SD = "them/sd"


def coded(pipe):
    pipe.set_progress_bar_config(disable=True)
    options = {
        "DiffCPipeline": {"max_bytes": 100, "num_coding_steps": 2},
        "RelicPipeline": {"max_bytes": 100},
        "PerCoPipeline": {},
    }
    return pipe.compress(photo, **options[type(pipe).__name__]).bitstreams[0].hex()


photo, plain, saved, files = Image.open(sys.argv[1]), *sys.argv[2:]
cells = {}
for codec, name in CLASSES.items():
    pushed, custom = f"me/{codec}", {"custom_pipeline": f"{files}/{codec}.py", "trust_remote_code": True}
    if codec == "diffc":
        assert "diffusers_compress" not in sys.modules  # the repository's own code imports the package
    cells[codec, "pushed", "trusted"] = coded(DiffusionPipeline.from_pretrained(pushed, trust_remote_code=True))

    import diffusers_compress

    ours = getattr(diffusers_compress, name)
    sources = {"saved": f"{saved}/{codec}", "pushed": pushed} | ({"folder": plain, "id": SD} if codec != "perco" else {})
    for where, source in sources.items():
        pipe = ours.from_pretrained(source)
        cells[codec, where, "class"] = coded(pipe)
        if where == "saved":
            cells[codec, where, "trusted"] = coded(DiffusionPipeline.from_pretrained(source, trust_remote_code=True))
        if where in ("folder", "id", "saved"):
            cells[codec, where, "file"] = coded(DiffusionPipeline.from_pretrained(source, **custom))
            by_id = DiffusionPipeline.from_pretrained(source, custom_pipeline=pushed, trust_remote_code=True)
            assert type(by_id) is ours
            cells[codec, where, "custom id"] = coded(by_id)

    cells[codec, "option", "local_files_only"] = coded(ours.from_pretrained(pushed, local_files_only=True))
    cells[codec, "option", "device_map"] = coded(ours.from_pretrained(pushed, device_map="cpu"))
    mixed = ours.from_pretrained(pushed, dtype={"vae": torch.float32, "default": torch.bfloat16})
    cells[codec, "option", "dtype"] = (mixed.vae.dtype, mixed.unet.dtype) == (torch.float32, torch.bfloat16)
    if codec == "perco":  # a plain model is not trained for it
        continue

    theirs = StableDiffusionPipeline.from_pretrained(plain)
    pipe = ours.from_pipe(theirs, dtype=theirs.dtype)
    assert pipe.unet is theirs.unet and pipe.vae is theirs.vae
    cells[codec, "pipe", "class"] = coded(pipe)
    pipe = ours.from_pipe(theirs, dtype=theirs.dtype, **custom)
    cells[codec, "pipe", "file"] = coded(pipe)

    # what from_pretrained passes on
    old, new = ours.from_pretrained(SD, revision="old"), ours.from_pretrained(SD)
    cells[codec, "option", "revision"] = old.fingerprint() != new.fingerprint()
    half = ours.from_pretrained(SD, variant="fp16", dtype=torch.float16)
    cells[codec, "option", "variant"] = (
        half.unet.dtype == half.vae.dtype == torch.float16 and half.fingerprint() == new.fingerprint()
    )
    try:
        config = PipelineQuantizationConfig(
            quant_backend="bitsandbytes_4bit", quant_kwargs={"load_in_4bit": True}, components_to_quantize=["unet"]
        )
        ours.from_pretrained(SD, quantization_config=config)
    except Exception as error:  # the library is not there, or has no GPU
        cells[codec, "option", "quantization_config"] = "bitsandbytes" in str(error) or "GPU" in str(error)

# adapters in a repository of the Hub: their revision is not that of their base, which has another
rates = ours.from_pretrained("me/rates", preset=1, revision="old")
cells["perco", "adapters", "preset"] = rates.hyper_encoder.config.stride
options = {"revision": "old", "preset": "0.0019"}
cells["perco", "adapters", "keyword"] = coded(ours.from_pretrained(pretrained_model_name_or_path="me/rates", **options))
given = rates.hyper_encoder
cells["perco", "adapters", "given"] = ours.from_pretrained("me/rates", hyper_encoder=given, **options).hyper_encoder is given
print(json.dumps([[*cell, value] for cell, value in cells.items()]))
