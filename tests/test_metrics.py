"""Metrics against independent implementations, and against what their definitions say of simple pictures."""

import math
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.linalg import sqrtm
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torchmetrics.functional.image import (
    learned_perceptual_image_patch_similarity,
    multiscale_structural_similarity_index_measure,
)
from torchmetrics.functional.image import peak_signal_noise_ratio as torchmetrics_psnr

from diffusers_compress import metrics
from diffusers_compress.metrics import distortion, learned, realism, wasserstein


def from_pil(image):
    return torch.from_numpy(np.array(image)).movedim(-1, 0).contiguous() / 255


def distorted(image):
    """The picture through JPEG's eyes: blurred, noisy, and off in contrast, at 8 bits."""
    rng = np.random.default_rng(1)
    samples = np.asarray(image.resize((image.width // 2, image.height // 2)).resize(image.size), dtype=float)
    return Image.fromarray((0.9 * samples + 10 + rng.normal(0, 6, samples.shape)).clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def pair(photo):
    """A picture [3, 192, 288] and a distorted one."""
    image = photo.resize((288, 192))
    return from_pil(image), from_pil(distorted(image))


def texture(seed, size=128):
    """Band-limited Gaussian noise [3, size, size]: independent draws are resamplings of one texture."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(3, size, size, generator=generator)
    radius = torch.hypot(*torch.meshgrid(torch.fft.fftfreq(size), torch.fft.fftfreq(size), indexing="ij"))
    noise = torch.fft.ifft2(torch.fft.fft2(noise) * ((radius > 0.08) & (radius < 0.35))).real
    return (0.5 + 0.1 * noise / noise.std()).clamp(0, 1)


def blurred(x):
    return torch.nn.functional.avg_pool2d(torch.nn.functional.pad(x[None], (2, 2, 2, 2), mode="circular"), 5, stride=1)[0]


# -------------------------------------------------------------------------------------------------------------- distortion


def test_psnr_is_that_of_scikit_image_and_torchmetrics(pair):
    x, x_hat = pair
    found = distortion.psnr(x, x_hat)
    assert found == pytest.approx(peak_signal_noise_ratio(x.numpy(), x_hat.numpy(), data_range=1), abs=1e-3)
    assert found == pytest.approx(torchmetrics_psnr(x_hat, x, data_range=1.0).item(), abs=1e-3)
    assert distortion.psnr(x, x) == math.inf


def test_ms_ssim_is_that_of_scikit_image(pair):
    """scikit-image has one scale only: five of them, the luminance term switched off by a large K1 on all but the last."""
    options = {"data_range": 1, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    channels = []
    for a, b in zip(*(x.double().numpy() for x in pair)):
        product = 1.0
        for scale, exponent in enumerate((0.0448, 0.2856, 0.3001, 0.2363, 0.1333)):
            product *= structural_similarity(a, b, K1=1e4 if scale < 4 else 0.01, **options) ** exponent
            a, b = (y.reshape(y.shape[0] // 2, 2, y.shape[1] // 2, 2).mean(axis=(1, 3)) for y in (a, b))
        channels.append(product)
    assert 0.3 < np.mean(channels) < 0.95
    assert distortion.ms_ssim(*pair) == pytest.approx(np.mean(channels), abs=1e-3)


def test_ms_ssim_is_that_of_torchmetrics(pair):
    for pictures in (pair, [x[:, :176, :176] for x in pair]):  # the second have the least size
        channels = [
            multiscale_structural_similarity_index_measure(b[None, None], a[None, None], data_range=1.0)
            for a, b in zip(*pictures)
        ]
        assert distortion.ms_ssim(*pictures) == pytest.approx(torch.stack(channels).mean().item(), abs=1e-3)
    assert distortion.ms_ssim(pair[0], pair[0]) == pytest.approx(1, abs=1e-6)


def test_ms_ssim_of_a_small_picture_is_refused():
    with pytest.raises(ValueError, match="200x175"):
        distortion.ms_ssim(torch.zeros(3, 175, 200), torch.zeros(3, 175, 200))


# ----------------------------------------------------------------------------------------------------- Wasserstein distortion


@pytest.mark.parametrize("log2_sigma", [0, 1.5, 4, 6])
def test_wasserstein_distortion_of_identical_pictures_is_zero(pair, log2_sigma):
    assert wasserstein.wasserstein_distortion(pair[0], pair[0], log2_sigma) == 0
    assert wasserstein.wasserstein_distortion(*pair, log2_sigma) > 0


def test_wasserstein_distortion_without_pooling_is_the_squared_error(pair):
    squared_error = 255**2 * (pair[0] - pair[1]).square().mean().item()
    assert wasserstein.wasserstein_distortion(*pair, log2_sigma=0) == pytest.approx(squared_error, rel=1e-4)


def test_framelets_are_a_tight_frame():
    x = torch.randn(3, 48, 72, generator=torch.Generator().manual_seed(0))
    energy = sum(y.square().mean(dim=(1, 2)).sum() for y in wasserstein.framelets(x))
    assert energy.item() == pytest.approx(x.square().mean(dim=(1, 2)).sum().item(), rel=1e-5)


def test_wasserstein_distortion_is_the_equation_on_constant_and_striped_features():
    """Means 0.2 and 0.5, deviations 0 and 0.1 everywhere away from the border: (0.3^2 + 0.1^2) 255^2."""
    flat = torch.full((1, 64, 64), 0.2)
    striped = 0.5 + 0.1 * (-1) ** torch.arange(64.0).expand(1, 64, 64)
    found = wasserstein.wasserstein_distortion(flat, striped, log2_sigma=1, features=lambda x: [x])
    assert found == pytest.approx(255**2 * (0.3**2 + 0.1**2), rel=0.02)


def test_wasserstein_distortion_is_linear_between_two_levels(pair):
    low, middle, high = (wasserstein.wasserstein_distortion(*pair, s, features=lambda x: [x]) for s in (2, 2.25, 3))
    assert middle == pytest.approx(0.75 * low + 0.25 * high, rel=1e-6)


def test_wasserstein_distortion_ranks_a_resampled_texture_above_a_blurred_one_at_large_pooling_only():
    """Qiu et al. 2024: fidelity at small pooling, realism at large pooling."""
    for seed in range(3):
        x, resampled = texture(seed), texture(100 + seed)
        assert wasserstein.wasserstein_distortion(x, resampled, 0) > wasserstein.wasserstein_distortion(x, blurred(x), 0)
        assert 4 * wasserstein.wasserstein_distortion(x, resampled, 5) < wasserstein.wasserstein_distortion(x, blurred(x), 5)


def test_vgg_features_feed_the_wasserstein_distortion(pair, monkeypatch):
    """The extractor itself, with random weights in place of the download."""
    from torchvision.models import VGG, VGG16_Weights

    torch.manual_seed(0)
    monkeypatch.setattr(VGG16_Weights, "get_state_dict", lambda *_, **__: {})
    monkeypatch.setattr(VGG, "load_state_dict", lambda *_, **__: None)
    features = wasserstein.vgg16_features()
    assert [tuple(y.shape) for y in features(pair[0])] == [
        (3, 192, 288),
        (64, 192, 288),
        (128, 96, 144),
        (256, 48, 72),
        (512, 24, 36),
    ]
    assert wasserstein.wasserstein_distortion(pair[0], pair[0], features=features) == 0
    assert wasserstein.wasserstein_distortion(*pair, features=features) > 0


# ------------------------------------------------------------------------------------------------------------------ realism


def test_sliced_wasserstein_is_zero_for_identical_pictures_and_ranks_resampled_above_blurred():
    x = texture(0)
    assert realism.sliced_wasserstein(x, x) == 0
    assert 3 * realism.sliced_wasserstein(x, texture(1)) < realism.sliced_wasserstein(x, blurred(x))


def test_laplacian_pyramid_sums_to_the_picture(pair):
    bands = realism.laplacian_pyramid(pair[0], 3)
    assert [tuple(y.shape[1:]) for y in bands] == [(192, 288), (96, 144), (48, 72)]
    x = bands[-1]
    for band in bands[-2::-1]:
        x = band + torch.nn.functional.interpolate(x[None], size=band.shape[-2:], mode="bilinear", align_corners=False)[0]
    assert torch.allclose(x, pair[0], atol=1e-6)


def test_high_frequency_ratio_is_the_ratio_of_powers():
    column = torch.arange(128.0)
    low, high = torch.cos(2 * math.pi * 0.05 * column), torch.cos(2 * math.pi * 0.4 * column)
    x, x_hat = ((0.5 + 0.2 * low + amplitude * high).expand(3, 96, 128) for amplitude in (0.2, 0.1))
    assert realism.high_frequency_ratio(x, x) == 1
    assert realism.high_frequency_ratio(x, x_hat) == pytest.approx(0.25, rel=1e-3)
    assert math.isnan(realism.high_frequency_ratio(torch.full((3, 64, 64), 0.5), x[:, :64, :64]))


# ------------------------------------------------------------------------------------------------- metrics that need weights


def test_lpips_takes_samples_from_0_to_1(pair, monkeypatch):
    from torchvision.models import AlexNet, AlexNet_Weights

    monkeypatch.setattr(AlexNet_Weights, "get_state_dict", lambda *_, **__: {})
    monkeypatch.setattr(AlexNet, "load_state_dict", lambda *_, **__: None)
    torch.manual_seed(0)
    function = metrics.PICTURE_METRICS["lpips_alex"].load()
    torch.manual_seed(0)
    x, x_hat = (2 * y[None] - 1 for y in pair)
    expected = learned_perceptual_image_patch_similarity(x_hat, x, net_type="alex", normalize=False).item()
    assert function(*pair, "") == pytest.approx(expected, rel=1e-4)
    assert function(pair[0], pair[0], "") == 0


def test_dists_is_that_of_torchmetrics(pair, monkeypatch):
    from torchmetrics.functional.image import deep_image_structure_and_texture_similarity
    from torchvision.models import VGG, VGG16_Weights

    monkeypatch.setattr(VGG16_Weights, "get_state_dict", lambda *_, **__: {})
    monkeypatch.setattr(VGG, "load_state_dict", lambda *_, **__: None)
    torch.manual_seed(0)
    function = metrics.PICTURE_METRICS["dists"].load()
    torch.manual_seed(0)
    expected = deep_image_structure_and_texture_similarity(pair[1][None], pair[0][None]).item()
    assert function(*pair, "") == pytest.approx(expected, rel=1e-4) and expected > 1e-3
    assert function(pair[0], pair[0], "") == pytest.approx(0, abs=1e-5)


def test_clip_score_is_100_cosines(pair, monkeypatch):
    monkeypatch.setattr(learned, "CLIP", ("ViT-S-32-alt", None))
    torch.manual_seed(0)
    to_image, to_caption = (metrics.PICTURE_METRICS[name].load() for name in ("clip_image", "clip_text"))
    assert to_image(pair[0], pair[0], "") == pytest.approx(100, abs=1e-3)
    assert to_image(*pair, "") < 100 - 1e-3
    assert -100 < to_caption(*pair, "a photo") < 99
    with pytest.raises(ValueError, match="no caption"):
        to_caption(*pair, "")


def test_mean_iou_by_hand():
    labels, labels_hat = torch.tensor([[0, 0, 1, 1]]), torch.tensor([[0, 1, 1, 2]])
    assert learned.mean_iou(labels, labels_hat) == pytest.approx((1 / 2 + 1 / 3 + 0) / 3)
    assert learned.mean_iou(labels, labels) == 1


def test_mean_iou_of_a_segmenter(pair, monkeypatch, tmp_path):
    from transformers import SegformerConfig, SegformerForSemanticSegmentation, SegformerImageProcessor

    torch.manual_seed(0)
    config = SegformerConfig(
        hidden_sizes=[8] * 4, decoder_hidden_size=8, num_attention_heads=[1] * 4, depths=[1] * 4, num_labels=5
    )
    SegformerForSemanticSegmentation(config).save_pretrained(tmp_path)
    SegformerImageProcessor(size={"height": 64, "width": 64}).save_pretrained(tmp_path)
    monkeypatch.setattr(learned, "SEGMENTER", str(tmp_path))
    function = metrics.PICTURE_METRICS["miou"].load()
    assert function(pair[0], pair[0], "") == 1
    assert 0 <= function(*pair, "") < 1


def test_half_shifted_patches():
    x = torch.arange(512 * 768.0).view(1, 512, 768)
    patches = learned.half_shifted_patches(x)
    corners = [divmod(int(p[0, 0, 0]), 768) for p in patches]
    assert corners == [(0, 0), (0, 256), (0, 512), (256, 0), (256, 256), (256, 512), (128, 128), (128, 384)]
    assert all(p.shape == (1, 256, 256) for p in patches)


def test_fid_is_the_frechet_distance_of_the_patches_features():
    import torch_fidelity

    class Means(torch_fidelity.FeatureExtractorBase):
        """Features of a patch: mean of each channel, deviation of the first."""

        def __init__(self, name, features_list, **_):
            super().__init__(name, features_list)

        def forward(self, x):
            return (features(x.float()),)

        @staticmethod
        def get_provided_features_list():
            return ("2048",)

        @staticmethod
        def get_default_feature_layer_for_metric(metric):
            return "2048"

        @staticmethod
        def can_be_compiled():
            return False

    def features(x):
        return torch.cat([x.mean(dim=(2, 3)), x[:, :1].std(dim=(2, 3))], dim=1) / 255

    torch_fidelity.register_feature_extractor("means", Means)
    originals = [torch.rand(3, 512, 768, generator=torch.Generator().manual_seed(seed)) ** (1 + seed) for seed in range(3)]
    decoded = [0.8 * x for x in originals]
    found = learned.load_fidelity("means")(originals, decoded)

    sets = [[learned.half_shifted_patches(x) for x in pictures] for pictures in (originals, decoded)]
    a, b = (features((255 * torch.stack(sum(patches, []))).round()).double().numpy() for patches in sets)
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    frechet = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a + cov_b - 2 * sqrtm(cov_a @ cov_b).real)
    assert found["patches"] == 24
    assert found["fid"] == pytest.approx(frechet, rel=1e-3)
    with pytest.raises(ValueError, match="0 patches"):
        learned.load_fidelity("means")([originals[0][:, :100]], [decoded[0][:, :100]])


def test_reason_is_one_short_line():
    error = URLError(OSError("Name or service not known"))
    assert metrics.reason(error) == "not available: <urlopen error Name or service not known>"
    assert metrics.reason(KeyError()) == "not available: KeyError"
    assert "\n" not in metrics.reason(ValueError("one\ntwo")) and len(metrics.reason(ValueError("x" * 999))) <= 160
