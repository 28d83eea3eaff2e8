"""Text+Sketch: what a file says, what the ControlNet sees of it, rates, candidates; prompts found by inversion."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, DDIMScheduler, StableDiffusionControlNetPipeline
from golden import make
from PIL import Image

from diffusers_compress import TextSketchPipeline, WrongModel, captions, codecs, embedded_model, inversion
from diffusers_compress.codecs.text_sketch import control, similarity
from diffusers_compress.codecs.text_sketch.format import IDS, WORDS, Parameters, grid_shape, read_file
from diffusers_compress.errors import Corrupt
from diffusers_compress.format import container

FEW = {"num_inference_steps": 2, "guidance_scale": 1.0}


@pytest.fixture(scope="module")
def pipe():
    """Its ControlNet sees a sketch in three channels, as published ones do."""
    return make.pipeline("text-sketch", "epsilon")


@pytest.fixture(scope="module")
def coloured():
    """Its ControlNet sees the thumbnail too."""
    return make.pipeline("text-sketch", "v_prediction")


def content(pipe, data):
    header, parameters, payload = read_file(data)
    return pipe.read_content(header, parameters, payload)


def decoded(pipe, data, **options):
    return np.asarray(pipe.decompress(data, **FEW | options).images[0]).astype(int)


# ---------------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    "parameters",
    [
        Parameters(),
        Parameters(prompt=WORDS, seed=1),
        Parameters(prompt=IDS, levels=2, side=128, thumbnail=8, seed=2**32 - 1),
        Parameters(levels=8, side=512, thumbnail=32),
    ],
)
def test_parameters_come_back_and_others_are_refused(parameters):
    data = parameters.to_bytes()
    assert Parameters.from_bytes(data) == parameters
    for damaged in (data + b"\0", data[:-1], bytes([data[0] | 1]) + data[1:], bytes([data[0] | 0b11000000]) + data[1:]):
        with pytest.raises(Corrupt):
            Parameters.from_bytes(damaged)


def test_values_beyond_their_range_are_corrupt():
    for parameters in Parameters(levels=2, side=513), Parameters(thumbnail=33), Parameters(seed=2**32):
        with pytest.raises(Corrupt):
            Parameters.from_bytes(parameters.to_bytes())


def test_sixteen_tokens_and_no_sketch_take_at_most_sixty_bytes(pipe):
    """The pixels count for nothing. Ids of CLIP's size are 16 bits each."""
    picture = Image.new("RGB", (512, 512), "gray")
    ids = np.random.default_rng(0).integers(0, 52, 16).tolist()
    out = pipe.compress(picture, prompt=[ids], sketch_size=0, thumbnail_size=0)
    assert len(out.bitstreams[0]) <= 60 and content(pipe, out.bitstreams[0]).ids == ids
    wide = TextSketchPipeline(**{**pipe.components, "tokenizer": Wide(pipe.tokenizer)})
    ids = np.random.default_rng(0).integers(0, 49406, 16).tolist()
    out = wide.compress(picture, prompt=[ids], sketch_size=0, thumbnail_size=0)
    assert len(out.bitstreams[0]) <= 60 and content(wide, out.bitstreams[0]).ids == ids


class Wide:
    """A tokenizer as large as CLIP's."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def __len__(self):
        return 49408


def test_a_prompt_is_the_tokenizers_ids_and_never_tokenized_again(pipe, photo):
    expected = pipe.tokenizer("a house", add_special_tokens=False).input_ids
    files = pipe.compress([photo] * 3, prompt=["a house", expected, ""]).bitstreams
    assert files[0] == files[1] and [content(pipe, data).ids for data in files] == [expected, expected, []]
    # ids that no text gives: two letters that do not end a word would be one word
    odd = [pipe.tokenizer.convert_tokens_to_ids(token) for token in ("a", "b", "c</w>", "d")]
    data = pipe.compress(photo, prompt=[odd]).bitstreams[0]
    assert content(pipe, data).ids == odd
    with torch.no_grad():
        seen = pipe.encode_prompt([odd, []])["text"]
        own = pipe.tokenizer(["", "a house"], padding="max_length", max_length=77, return_tensors="pt").input_ids
        assert torch.equal(seen[1], pipe.text_encoder(own)[0][0])
        assert torch.equal(pipe.encode_prompt([expected])["text"][0], pipe.text_encoder(own)[0][1])
    long = pipe.compress(photo, prompt="a " * 80)
    assert len(content(pipe, long.bitstreams[0]).ids) == 75 and "first 75" in long.notes[0][0]
    for prompt, captioner, match in (
        ([[5000]], None, "token 5000"),
        (["a", "b"], None, "2 prompts"),
        ("a", lambda pictures: ["b"], "not both"),
    ):
        with pytest.raises(ValueError, match=match):
            pipe.compress(photo, prompt=prompt, captioner=captioner)


def test_a_captioner_makes_texts_or_ids(pipe, photo):
    files = pipe.compress([photo] * 2, captioner=lambda pictures: ["a house", [3, 4]]).bitstreams
    assert [content(pipe, data).ids for data in files] == [
        content(pipe, pipe.compress(photo, "a house").bitstreams[0]).ids,
        [3, 4],
    ]


def test_the_facts_of_a_file(pipe, photo):
    facts = codecs.describe(pipe.compress(photo, prompt="ab", seed=3).bitstreams[0])
    assert facts["sketch"] == [64, 96] and facts["thumbnail"] == [5, 8] and (facts["levels"], facts["seed"]) == (2, 3)
    facts = codecs.describe(pipe.compress(photo, thumbnail_size=0, sketch_size=0).bitstreams[0])
    assert facts["sketch"] == facts["thumbnail"] == facts["prompt"] == "none"
    assert grid_shape(1, 1000, 128) == (1, 128) and grid_shape(3, 3, 128) == (3, 3)


# ---------------------------------------------------------------------------------------------------------------------- rates


def test_fewer_lines_where_a_file_must_be_smaller(pipe, photo):
    picture = photo.resize((144, 96))
    whole, lines = pipe.compress(picture, threshold=0.1).bitstreams[0], []
    for limit in (len(whole), len(whole) // 2, len(whole) // 4):
        data = pipe.compress(picture, threshold=0.1, max_bytes=limit).bitstreams[0]
        lines.append(int(content(pipe, data).sketch.sum()))
        assert 0.6 * limit <= len(data) <= limit
    assert lines[0] > lines[1] > lines[2] > 0
    bare = pipe.compress(picture, sketch_size=0).bitstreams[0]
    assert pipe.compress(picture, max_bytes=len(bare)).bitstreams[0] == bare
    with pytest.raises(ValueError, match=f"may take {len(bare) - 1} bytes.*has {len(bare)}"):
        pipe.compress(picture, max_bytes=len(bare) - 1)


@pytest.mark.parametrize(
    ("name", "value"),
    [("levels", 9), ("sketch_size", 513), ("thumbnail_size", 33), ("threshold", 0.0), ("candidates", 0), ("seed", -1)],
)
def test_arguments_out_of_range(pipe, photo, name, value):
    with pytest.raises(ValueError, match=name):
        pipe.compress(photo, **{name: value})


@pytest.mark.parametrize(("name", "value"), [("strength", 0), ("control_guidance_end", 1.1), ("num_inference_steps", 0)])
def test_arguments_of_the_decoder_out_of_range(pipe, name, value):
    with pytest.raises(ValueError, match=name):
        pipe.decompress([], **{name: value})


def test_any_detector_and_soft_edges(pipe, photo):
    def detector(picture):
        assert picture.shape == (64, 96, 3) and 0 <= picture.min() and picture.max() <= 1
        return (1.4 * picture[..., 0] - 0.4).clip(0, 1)

    sketch = content(pipe, pipe.compress(photo, detector=detector, levels=8, threshold=0.3).bitstreams[0]).sketch
    assert sketch.shape == (64, 96) and {0, 1, 4, 7} <= set(np.unique(sketch)) <= set(range(8))
    bright = np.asarray(photo)[..., 0]
    assert bright[sketch == 7].mean() > bright[sketch == 1].mean() > bright[sketch == 0].mean()


# ------------------------------------------------------------------------------------------------------------------ the picture


@torch.no_grad()
def test_the_denoiser_is_that_of_diffusers_own_controlnet_pipeline(pipe, photo):
    """Two steps of diffusers' pipeline, with guidance, on our control image, are two of ours."""
    theirs = StableDiffusionControlNetPipeline(
        **{**pipe.components, "scheduler": DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")},
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    theirs.set_progress_bar_config(disable=True)
    data = pipe.compress(photo, prompt="a house", thumbnail_size=0, threshold=0.1).bitstreams[0]
    says = content(pipe, data)
    painting = control.Painting(2, 3.0, 0.7, 1.0, 1.0)
    sketch = torch.from_numpy(says.sketch).float()[None]
    seen = control.conditioning_of(pipe, sketch, None, (64, 96), painting)
    x = torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(0))
    options = {"prompt": "a house", "guidance_scale": 3.0, "num_inference_steps": 2, "controlnet_conditioning_scale": 0.7}
    expected = theirs(**options, image=seen["control"], latents=x.clone(), output_type="latent").images

    def steps(network):
        latent = x
        for t in theirs.scheduler.timesteps:
            latent = theirs.scheduler.step(network(latent, [int(t)], [0]), t, latent, return_dict=False)[0]
        return [latent]

    (ours,) = pipe.with_network(steps, [says.ids], 3.0, extra_conditioning=seen)
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)
    (without,) = pipe.with_network(steps, [says.ids], 3.0)
    assert not torch.allclose(without, expected, rtol=1e-2, atol=1e-2)


def test_the_sketch_is_seen_as_long_and_as_much_as_is_asked(pipe, photo):
    with_lines = pipe.compress(photo, threshold=0.1).bitstreams[0]
    without = pipe.compress(photo, sketch_size=0).bitstreams[0]
    plain, lined = decoded(pipe, without), decoded(pipe, with_lines)
    assert np.abs(plain - lined).max() > 8
    assert np.array_equal(decoded(pipe, with_lines, control_guidance_end=0.0), plain)
    assert np.array_equal(decoded(pipe, with_lines, controlnet_conditioning_scale=0.0), plain)
    for options in {"control_guidance_end": 0.5}, {"controlnet_conditioning_scale": 0.5}:
        half = decoded(pipe, with_lines, **options)
        assert not np.array_equal(half, plain) and not np.array_equal(half, lined)


def test_the_picture_has_the_thumbnails_colours(pipe):
    """Left red, right blue, whatever the model would paint; without a thumbnail it is not so."""
    picture = Image.new("RGB", (96, 64), "red")
    picture.paste("blue", (48, 0, 96, 64))
    expected = np.asarray(picture.resize((8, 5), Image.Resampling.BOX)).astype(int)

    def error(**options):
        image = decoded(pipe, pipe.compress(picture, **options).bitstreams[0]).astype(np.uint8)
        return np.abs(np.asarray(Image.fromarray(image).resize((8, 5), Image.Resampling.BOX)) - expected).mean()

    assert error() < 30 and error(thumbnail_size=0) > 60


def test_a_controlnet_of_four_channels_sees_colours(coloured, photo):
    image = control.control_image(torch.ones(1, 2, 3), torch.full((3, 2, 3), -1.0), 4, 2, 3)
    assert image[0].eq(1).all() and image[1:].eq(0).all()
    assert control.control_image(None, None, 4, 2, 3)[1:].eq(control.ABSENT).all()
    with pytest.raises(ValueError, match="5 channels"):
        control.control_image(None, None, 5, 2, 3)
    data = coloured.compress(photo, sketch_size=0).bitstreams[0]
    assert not np.array_equal(decoded(coloured, data), decoded(coloured, data, controlnet_conditioning_scale=0.0))


def test_without_a_controlnet_files_have_no_sketch(tiny_sd_folder, pipe, photo):
    plain = TextSketchPipeline.from_pretrained(tiny_sd_folder)
    plain.set_progress_bar_config(disable=True)
    out = plain(photo, prompt="abc", **FEW)
    assert codecs.describe(out.bitstreams[0])["sketch"] == "none" and out.images[0].size == photo.size
    with pytest.raises(ValueError, match="needs a ControlNet"):
        plain.compress(photo, sketch_size=64)
    with pytest.raises(WrongModel, match="no ControlNet"):
        plain.decompress(pipe.compress(photo, threshold=0.1).bitstreams[0], allow_other_model=True)


def test_ids_of_a_larger_vocabulary_are_corrupt(pipe, photo):
    wide = TextSketchPipeline(**{**pipe.components, "tokenizer": Wide(pipe.tokenizer)})
    data = wide.compress(photo, prompt=[[40000]]).bitstreams[0]
    with pytest.raises(Corrupt, match="tokenizer does not have"):
        pipe.decompress(data)


# ------------------------------------------------------------------------------------------------------------------- candidates


def test_the_best_candidate_is_named_by_its_seed(pipe, photo):
    """Decoded as the sender did, it is the very picture that was chosen."""
    seen = []

    def brightness(original, candidate):
        assert original.size == candidate.size == photo.size
        seen.append(np.asarray(candidate).astype(int))
        return float(seen[-1].mean())

    data = pipe.compress(photo, thumbnail_size=0, candidates=3, seed=10, similarity=brightness, decoding=FEW).bitstreams[0]
    best = max(range(3), key=lambda i: seen[i].mean())
    assert len(seen) == 3 and read_file(data)[1].seed == 10 + best
    assert np.array_equal(decoded(pipe, data), seen[best])
    assert {tuple(each.ravel()[:9]) for each in seen}.__len__() == 3
    first = pipe.compress(photo, thumbnail_size=0, seed=10).bitstreams[0]
    assert np.array_equal(decoded(pipe, first), seen[0])


def test_structure_prefers_what_is_alike(photo):
    rng = np.random.default_rng(2)
    noisy = Image.fromarray((np.asarray(photo) + rng.normal(0, 20, (64, 96, 3))).clip(0, 255).astype(np.uint8))
    blurred, turned = photo.resize((12, 8)).resize((96, 64)), photo.transpose(Image.Transpose.ROTATE_180)
    noise = Image.fromarray(rng.integers(0, 256, (64, 96, 3), dtype=np.uint8))
    assert similarity.structure(photo, photo) == pytest.approx(1, abs=1e-4)
    noisy, blurred, turned, noise = (similarity.structure(photo, other) for other in (noisy, blurred, turned, noise))
    assert min(noisy, blurred) > 0.8 > turned + 0.1 and noise < 0.3


# ---------------------------------------------------------------------------------------------------------------------- loading


def test_it_is_saved_and_loaded_with_its_controlnet(pipe, photo, tmp_path):
    data = pipe.compress(photo, threshold=0.1).bitstreams[0]
    pipe.save_pretrained(tmp_path / "whole")
    again = TextSketchPipeline.from_pretrained(tmp_path / "whole")
    assert type(again.controlnet) is ControlNetModel and np.array_equal(decoded(again, data), decoded(pipe, data))
    # as examples/train_sketch_controlnet.py writes it: the ControlNet, and the name of the model under it
    folder = tmp_path / "lines"
    pipe.controlnet.save_pretrained(folder / "controlnet")
    (folder / "adapter.json").write_text(json.dumps({"base": "../whole"}))
    over = TextSketchPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    assert over.fingerprint() == pipe.fingerprint() and over.controlnet.dtype == torch.bfloat16
    pipe.components["controlnet"].controlnet_mid_block.weight.data.neg_()
    try:
        assert over.fingerprint() != pipe.fingerprint()
    finally:
        pipe.components["controlnet"].controlnet_mid_block.weight.data.neg_()


# -------------------------------------------------------------------------------------------------------------------- inversion


@pytest.fixture(scope="module")
def clip_name(tmp_path_factory):
    """CLIP, small and of random weights, registered with open_clip like its own configurations."""
    import open_clip

    folder = tmp_path_factory.mktemp("clip")
    vision = {"image_size": 32, "layers": 1, "width": 16, "patch_size": 16, "head_width": 8}
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    (folder / "clip_tiny.json").write_text(json.dumps({"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(folder)
    return "clip_tiny"


@pytest.fixture(scope="module")
def clip(clip_name):
    torch.manual_seed(0)
    return inversion._load(clip_name, "cpu")


def test_inversion_finds_a_prompt_that_is_more_like_the_picture(clip, photo):
    model, encode, begin, end = clip
    ids, history = inversion.invert(model, encode(photo), begin, end, tokens=4, steps=40)
    assert history == sorted(history) and history[-1] > history[0] + 0.02 and len(ids) == 4
    assert not {begin, end} & set(ids)
    text = torch.zeros(1, 77, dtype=torch.long)
    text[0, :6] = torch.tensor([begin, *ids, end])
    with torch.no_grad():
        found = torch.cosine_similarity(model.encode_text(text), encode(photo)).item()
    assert found == pytest.approx(history[-1], abs=1e-5)
    assert inversion.invert(model, encode(photo), begin, end, tokens=4, steps=40)[0] == ids


def test_inversion_follows_the_gradient(clip, photo):
    """Of the similarity, by each token's embedding: against differences."""
    model, encode, begin, end = clip
    ids, target = torch.tensor([320, 1125]), encode(photo)
    before, gradient = inversion._similarity(model, target, ids, begin, end)
    step = 1e-2 * gradient / gradient.norm()
    table, kept = model.token_embedding.weight.data, model.token_embedding.weight.data.clone()
    table[ids] += step
    after, _ = inversion._similarity(model, target, ids, begin, end)
    table.copy_(kept)
    assert after - before == pytest.approx(1e-2 * gradient.norm().item(), rel=0.2)


def test_a_captioner_that_inverts(clip_name, photo, capsys, monkeypatch):
    invert = inversion.invert
    monkeypatch.setattr(inversion, "invert", lambda *given: invert(*given[:4], 3, 2, *given[6:]))
    torch.manual_seed(0)
    prompts = captions.load_captioner(f"invert:{clip_name}")([photo, photo])
    assert [len(ids) for ids in prompts] == [3, 3] and prompts[0] == prompts[1] and "inversion" in capsys.readouterr().err


def test_a_likeness_by_clip(clip_name, photo):
    likeness = inversion.load_similarity(clip_name)
    same, other = likeness(photo, photo), likeness(photo, Image.new("RGB", (40, 40), "red"))
    assert same == pytest.approx(1, abs=1e-5) and other < 0.999


def test_a_file_of_another_codecs_number_is_not_read(pipe, photo):
    header, _ = container.read_header(pipe.compress(photo).bitstreams[0])
    other = container.Header(1, header.width, header.height, header.fingerprint, b"")
    with pytest.raises(WrongModel, match="TextSketch"):
        read_file(container.pack(other, b""))


# ------------------------------------------------------------------------------------------------------------ the embedded model


def test_the_embedded_controlnet_paints_along_the_lines():
    """Gradients of the decoded picture are steeper at the file's lines than at the same lines mirrored. It takes at most 6 MB."""
    folder = Path(embedded_model("text-sketch"))
    assert sum(path.stat().st_size for path in folder.rglob("*.safetensors")) <= 6_000_000
    pipe = TextSketchPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    picture = Image.open(folder.parent / "coffee.jpg").convert("RGB").resize((256, 192))
    data = pipe.compress(picture, sketch_size=64).bitstreams[0]
    image = pipe.decompress(data, num_inference_steps=6).images[0].resize((64, 48), Image.Resampling.BOX)
    steep = np.hypot(*np.gradient(np.asarray(image.convert("L"), dtype=float)))
    lines = content(pipe, data).sketch > 0
    assert steep[lines].mean() > 1.1 * steep[lines[:, ::-1]].mean()
