"""Where the bits go: maps from what users give, and what codecs make of them."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import SegformerConfig, SegformerForSemanticSegmentation, SegformerImageProcessor

from diffusers_compress import DiffCPipeline, RelicPipeline, cli, embedded_model, images
from diffusers_compress.cli.demo import demo_photo
from diffusers_compress.codecs.relic.format import describe, read_file
from diffusers_compress.images import open_image
from diffusers_compress.importance import maps_of, on_latent, saliency, segmenter

BOX = (32, 48, 80, 96)  # of 128x128: about a seventh
FAST = {"num_inference_steps": 2}


@pytest.fixture(scope="module")
def cup():
    """128x128 pixels of the photo that comes with the package."""
    return open_image(demo_photo()).crop((300, 100, 556, 356)).resize((128, 128))


@pytest.fixture(scope="module")
def diffc():
    pipe = DiffCPipeline.from_pretrained(embedded_model())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def mask():
    values = np.zeros((128, 128), bool)
    values[BOX[1] : BOX[3], BOX[0] : BOX[2]] = True
    return values


def errors(image, decoded, mask):
    """Mean squared error (within, without) the mask."""
    squared = np.square(np.asarray(image, float) - np.asarray(decoded, float)).mean(2)
    return squared[mask].mean(), squared[~mask].mean()


# ------------------------------------------------------------------------------------------------------------------------ maps


def test_one_map_however_it_is_given(mask):
    x = torch.zeros(3, 128, 128)
    kinds = [
        mask,
        torch.from_numpy(mask),
        mask.astype(np.float32) / 3,  # the largest value counts as 1
        Image.fromarray(mask),
        Image.fromarray(mask.astype(np.uint8) * 200).convert("RGB"),
        [BOX],
        ((32, 48, 80, 70), (32, 70, 80, 96)),
        lambda image: [BOX] if image.size == (128, 128) else None,
    ]
    for kind in kinds:
        (found,) = maps_of(kind, [x])
        assert torch.equal(found, torch.from_numpy(mask).float())
    assert maps_of(None, [x, x]) == maps_of([None, lambda image: None], [x, x]) == [None, None]
    assert maps_of(np.zeros((128, 128)), [x]) == [None]  # nothing matters more than the rest
    first, second, third = maps_of([[BOX], None, mask], [x, x, x])
    assert torch.equal(first, third) and second is None


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (np.ones((128, 64)), "has 64x128 pixels, the picture 128x128"),
        ([(0, 0, 129, 5)], "not within the picture of 128x128"),
        ([(5, 0, 5, 9)], "is empty"),
        (np.ones((2, 128, 128)), r"shape \[H, W\]"),
        (np.ones((128, 128), int), "int64"),
        ([None, None], "2 importance maps were given for 1 pictures"),
        (3, "importance is a int"),
        ("mask.png", "permitted names are"),
    ],
)
def test_what_is_no_map_is_refused(given, words):
    with pytest.raises(ValueError, match=words):
        maps_of(given, [torch.zeros(3, 128, 128)])


def test_a_latent_position_has_the_largest_value_within():
    values = torch.zeros(64, 96)
    values[15, 31], values[63, 95] = 0.5, 1
    assert on_latent(values, (4, 6)).nonzero().tolist() == [[0, 1], [3, 5]]


def test_what_stands_out_is_found():
    generator = np.random.default_rng(0)
    grass = generator.integers(90, 130, (120, 200, 3)).astype(np.uint8)
    grass[30:60, 140:170] = [220, 40, 40]
    found = saliency(Image.fromarray(grass))
    assert found.shape == (120, 200) and 0 <= found.min() <= found.max() <= 1
    assert found[30:60, 140:170].mean() > 2 * found.mean()
    for size in (1, 1), (300, 1), (7, 500):
        assert saliency(Image.new("RGB", size, "red")).isfinite().all()


def test_a_segmenter_by_name(tmp_path, cup):
    """A real model of transformers in miniature, whose weights are zero but for one label."""
    names = {0: "sky", 1: "cup", 2: "hand"}
    config = SegformerConfig(
        hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], num_attention_heads=[1, 1, 1, 1], decoder_hidden_size=8, id2label=names
    )
    model = SegformerForSemanticSegmentation(config)
    torch.nn.init.zeros_(model.decode_head.classifier.weight)
    with torch.no_grad():
        model.decode_head.classifier.bias.copy_(torch.tensor([0.0, 5.0, 0.0]))
    model.save_pretrained(tmp_path)
    SegformerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(tmp_path)
    x = images.to_tensor(cup)[0]
    assert maps_of(f"{tmp_path}:cup+hand", [x])[0].min() == 1
    assert maps_of(segmenter(f"{tmp_path}:sky"), [x]) == [None]
    with pytest.raises(ValueError, match="has no label dog; it has cup, hand, sky"):
        segmenter(f"{tmp_path}:cup+dog")


# ---------------------------------------------------------------------------------------------------------------------- codecs


def test_diffc_sends_the_bits_where_they_are_wanted(diffc, cup, mask):
    """Any receiver decodes it: it is a file like others."""
    plain, focused = (diffc.compress(cup, max_bytes=200, importance=where).bitstreams[0] for where in (None, mask))
    assert len(plain) == len(focused) <= 200
    decoded = diffc.decompress([plain, focused], **FAST)
    (inside, outside), (inside_focused, outside_focused) = (errors(cup, image, mask) for image in decoded.images)
    assert inside_focused < inside / 10**0.15 and outside < outside_focused < 3 * outside
    assert decoded.notes == [[], []]


def test_relic_has_finer_steps_where_they_are_wanted(cup, mask):
    pipe = RelicPipeline.from_pretrained(embedded_model())
    pipe.set_progress_bar_config(disable=True)
    plain, focused = (pipe.compress(cup, max_bytes=500, importance=where).bitstreams[0] for where in (None, mask))
    assert len(plain) <= 500 and len(focused) <= 500
    decoded = pipe.decompress([plain, focused], **FAST)
    (inside, outside), (inside_focused, outside_focused) = (errors(cup, image, mask) for image in decoded.images)
    assert inside_focused < inside / 10**0.1 and outside < outside_focused
    assert np.array_equal(np.array(read_file(focused)[1].levels) == 0, mask[8::16, 8::16])
    assert describe(focused)["regions"] and not describe(plain)["regions"]
    with pytest.raises(ValueError, match="importance needs plain rounding"):
        pipe.compress(cup, max_bytes=500, rounding="dithered", importance=mask)


def test_a_batch_has_each_its_own_map(diffc, cup):
    both = diffc.compress([cup, cup], fidelity=0.5, importance=[[BOX], None]).bitstreams
    alone = [diffc.compress(cup, fidelity=0.5, importance=where).bitstreams[0] for where in ([BOX], [(0, 0, 128, 128)])]
    assert both == alone
    assert len(both[0]) < 0.85 * len(both[1])  # down to the same noise level


def test_not_with_a_target_of_quality(diffc, cup):
    with pytest.raises(ValueError, match="PSNR, dB counts: give a rate or fidelity"):
        diffc.compress(cup, target_psnr=20, importance=[BOX])


def test_the_command_line(cup, mask, tmp_path, capsys):
    cup.save(tmp_path / "cup.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    files = []
    for where in (tmp_path / "mask.png", "32,48,80,96"):
        files.append(tmp_path / f"{len(files)}.dfc")
        words = ["encode", tmp_path / "cup.png", files[-1], "--max-bytes", 100, "--device", "cpu", "--importance", where]
        assert cli.main(list(map(str, words))) == 0
    assert files[0].read_bytes() == files[1].read_bytes()
    for codec, where, words in ("diffc", "nothing.png", "permitted names are"), ("perco", "saliency", "no such option"):
        given = ["encode", tmp_path / "cup.png", tmp_path / "x.dfc", "--codec", codec, "--importance", where, "--device", "cpu"]
        assert cli.main([*map(str, given), *(["--bpp", "1"] if codec == "diffc" else [])]) in (1, 2)
        assert words in capsys.readouterr().err
