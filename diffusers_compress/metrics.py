"""Distortion and realism of decoded pictures, which every function takes as float32 [3, H, W] in [0, 1], made of 8-bit samples.

`PICTURE_METRICS` compare one picture with its original, `SET_METRICS` two sets of pictures. A metric is loaded when asked for;
those of `WITHOUT_WEIGHTS` need no weights and no library beside torch, and are the default.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import Subset

CLIP = ("ViT-B-32-quickgelu", "openai")  # open_clip: model, weights
SEGMENTER = "nvidia/segformer-b0-finetuned-ade-512-512"  # Hub id or folder
LOG2_SIGMA = 4.0  # pooling of the Wasserstein distortions in the tables: 16 pixels


class Metric(NamedTuple):
    """`load()` gives the function, or raises whatever keeps it away: a missing library, weights that cannot be fetched.

    A picture metric's function takes (x, x_hat, caption) and gives a float; a set metric's takes two series of pictures and gives
    floats by name. `best` is what it tends to for a perfect picture.
    """

    label: str
    best: float
    load: Callable[[], Callable]


def samples(image: Image.Image) -> torch.Tensor:
    """An 8-bit RGB picture as float32 [3, H, W] in [0, 1]."""
    return torch.from_numpy(np.array(image)).movedim(-1, 0).contiguous() / 255


# -------------------------------------------------------------------------------------------------------------- distortion


def psnr(x: torch.Tensor, x_hat: torch.Tensor) -> float:
    """PSNR in dB over all samples: -10 log10 MSE."""
    mse = (x.double() - x_hat.double()).square().mean().item()
    return -10 * math.log10(mse) if mse else math.inf


def ms_ssim(x: torch.Tensor, x_hat: torch.Tensor) -> float:
    """MS-SSIM (Wang, Simoncelli, Bovik 2003), mean over the RGB channels. ValueError below 161 pixels a side."""
    if min(x.shape[-2:]) < 161:
        raise ValueError(f"picture has {x.shape[-1]}x{x.shape[-2]} pixels, five scales need 161 a side")
    result = torch.ones(len(x))
    for scale, exponent in enumerate((0.0448, 0.2856, 0.3001, 0.2363, 0.1333)):
        luminance, contrast = ssim_terms(x, x_hat)
        term = contrast if scale < 4 else luminance * contrast
        result *= term.mean(dim=(1, 2)).clamp(min=0) ** exponent
        x, x_hat = F.avg_pool2d(x, 2), F.avg_pool2d(x_hat, 2)
    return result.mean().item()


def ssim_terms(x, x_hat):
    """The luminance term and the product of the contrast and structure terms of SSIM around each place, [C, H - 10, W - 10]."""
    window = torch.exp(-torch.arange(-5.0, 6.0).square() / (2 * 1.5**2))
    window = (window / window.sum()).expand(len(x), 1, 1, 11)

    def local(y):
        return F.conv2d(F.conv2d(y, window, groups=len(y)), window.mT, groups=len(y))

    mu, mu_hat = local(x), local(x_hat)
    var, var_hat, cov = local(x * x) - mu * mu, local(x_hat * x_hat) - mu_hat * mu_hat, local(x * x_hat) - mu * mu_hat
    c_1, c_2 = 0.01**2, 0.03**2
    return (2 * mu * mu_hat + c_1) / (mu * mu + mu_hat * mu_hat + c_1), (2 * cov + c_2) / (var + var_hat + c_2)


# ----------------------------------------------------------------------------------------------------- Wasserstein distortion


def framelets(x: torch.Tensor, scales: int = 3) -> list[torch.Tensor]:
    """Piecewise linear B-spline framelets of x [C, H, W]: maps [8 C, H/2, W/2], [8 C, H/4, W/4] ... and the rest [C, h, w].

    A pyramid of oriented derivatives of order 0, 1 and 2 along each side, and a tight frame: with sides that are multiples of
    2^scales, the mean squares of all channels sum to that of x (Ron, Shen: Affine systems in L2(R^d), 1997). Borders wrap around.
    """
    # h_0, h_1, h_2 with sum |h_i(w)|^2 = 1 and sum h_i(w) h_i(w + pi)* = 0
    h = torch.tensor([[1, 2, 1], [math.sqrt(2), 0, -math.sqrt(2)], [-1, 2, -1]], dtype=x.dtype) / 4
    bank = torch.einsum("iy,jx->ijyx", h, h).reshape(9, 1, 3, 3)
    maps = []
    for _ in range(scales):
        y = F.conv2d(F.pad(x[:, None], (1, 1, 1, 1), mode="circular"), bank, stride=2)
        maps.append(y[:, 1:].flatten(0, 1))
        x = y[:, 0]
    return [*maps, x]


def vgg16_features() -> Callable:
    """x -> maps of VGG16 (ImageNet weights of torchvision) before each of its first four poolings, and x itself."""
    from torchvision.models import VGG16_Weights, vgg16

    layers = vgg16(weights=VGG16_Weights.IMAGENET1K_V1).features[:23].eval().requires_grad_(False)
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)

    def features(x):
        maps, y = [x], ((x - mean) / std)[None]
        for number, layer in enumerate(layers):
            y = layer(y)
            if number in (3, 8, 15, 22):
                maps.append(y[0])
        return maps

    return features


def pool(x: torch.Tensor) -> torch.Tensor:
    """x [C, H, W] low-passed with [1 2 1] / 4 along both sides, at every second sample."""
    kernel = torch.tensor([1.0, 2.0, 1.0], dtype=x.dtype).expand(len(x), 1, 1, 3) / 4
    x = F.pad(x[None], (1, 1, 1, 1), mode="replicate")[0]
    return F.conv2d(F.conv2d(x, kernel, stride=(1, 2), groups=len(x)), kernel.mT, stride=(2, 1), groups=len(x))


def local_statistics(y: torch.Tensor, levels: int):
    """Mean and standard deviation of y [C, H, W] around each place, pooled over 2^0, 2^1 ... 2^levels samples."""
    mean, square = y, y.square()
    yield mean, torch.zeros_like(mean)
    for _ in range(levels):
        mean, square = pool(mean), pool(square)
        yield mean, (square - mean.square()).clamp(min=0).sqrt()


@torch.no_grad()
def wasserstein_distortion(x, x_hat, log2_sigma: float = LOG2_SIGMA, features: Callable = framelets) -> float:
    """Wasserstein distortion with pooling width 2^log2_sigma pixels, in squared 8-bit levels.

    Qiu, Wagner, Balle, Theis: Wasserstein Distortion: Unifying Fidelity and Realism (CISS 2024), mean over all places.

    `features` takes x to a list of maps [C, h, w]; a smaller map is pooled over as many fewer samples. Between two levels of
    pooling it is linear in log2_sigma. At 0 it is the squared error of the features, which for `framelets` is that of x.
    """
    total = 0.0
    for y, y_hat in zip(features(x), features(x_hat)):
        log2_samples = max(0.0, log2_sigma - math.log2(x.shape[-1] / y.shape[-1]))
        levels = math.ceil(log2_samples)
        pairs = zip(local_statistics(y, levels), local_statistics(y_hat, levels))
        for level, ((mu, nu), (mu_hat, nu_hat)) in enumerate(pairs):
            weight = max(0.0, 1 - abs(log2_samples - level))
            if weight > 0:
                # W_2^2 of two distributions known by mean and deviation: (mu - mu')^2 + (nu - nu')^2
                distance = (mu - mu_hat).square() + (nu - nu_hat).square()
                total += weight * distance.mean(dim=(1, 2)).sum().item()
    return 255**2 * total / len(x)


# ------------------------------------------------------------------------------------------------------------------- realism


def laplacian_pyramid(x: torch.Tensor, levels: int) -> list[torch.Tensor]:
    """Band-passes of x [C, H, W] from fine to coarse, each half the size of the one before, and the rest (Burt, Adelson 1983)."""
    bands = []
    for _ in range(levels - 1):
        low = pool(x)
        bands.append(x - F.interpolate(low[None], size=x.shape[-2:], mode="bilinear", align_corners=False)[0])
        x = low
    return [*bands, x]


@torch.no_grad()
def sliced_wasserstein(x, x_hat, levels: int = 3, patches: int = 4096, projections: int = 128) -> float:
    """Sliced Wasserstein distance times 1000 between the 7x7 patches of the Laplacian pyramids, mean over levels.

    Karras et al.: Progressive Growing of GANs (2018), section 5, with one picture for a set: how alike the patches are as a
    crowd, wherever they stand. Both are normalised by the original's mean and deviation, so that lost contrast counts.
    """
    generator = torch.Generator().manual_seed(0)
    distances = []
    for band, band_hat in zip(laplacian_pyramid(x, levels), laplacian_pyramid(x_hat, levels)):
        mean, std = band.mean(dim=(1, 2), keepdim=True), band.std(dim=(1, 2), keepdim=True).clamp(min=1e-6)
        top, left = (torch.randint(size - 6, (patches,), generator=generator) for size in band.shape[-2:])
        directions = F.normalize(torch.randn(projections, 147, generator=generator), dim=1)
        seven = (((y - mean) / std).unfold(1, 7, 1).unfold(2, 7, 1)[:, top, left] for y in (band, band_hat))  # [C, patches, 7, 7]
        a, b = ((directions @ y.movedim(1, 0).flatten(1).T).sort(dim=1).values for y in seven)
        distances.append((a - b).abs().mean().item())
    return 1000 * sum(distances) / levels


def high_frequency_power(x: torch.Tensor) -> float:
    """Power of the luma of x [3, H, W] above a quarter cycle per pixel, half of what the grid can hold, in any direction."""
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)  # BT.601
    luma = torch.einsum("c,chw->hw", weights, x.double())
    height, width = luma.shape
    window = torch.outer(torch.hann_window(height, dtype=torch.float64), torch.hann_window(width, dtype=torch.float64))
    power = torch.fft.fft2((luma - luma.mean()) * window).abs().square()
    radius = torch.hypot(*torch.meshgrid(torch.fft.fftfreq(height), torch.fft.fftfreq(width), indexing="ij"))
    return power[radius > 0.25].sum().item()


def high_frequency_ratio(x: torch.Tensor, x_hat: torch.Tensor) -> float:
    """High-frequency power of the decoded picture over that of the original: below 1 is blurred, above 1 is noisy.

    The spectral view of generated pictures of Durall, Keuper, Keuper: Watch your Up-Convolution (CVPR 2020), as one number.
    """
    original = high_frequency_power(x)
    return high_frequency_power(x_hat) / original if original else math.nan


# -------------------------------------------------------------------------------------------------- metrics that need weights


def load_lpips(net: str):
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    metric = LearnedPerceptualImagePatchSimilarity(net_type=net, normalize=True).eval()  # normalize: samples are in [0, 1]
    return without_caption(lambda x, x_hat: metric(x_hat[None], x[None]).item())


def load_dists():
    from torchmetrics.functional.image.dists import DISTSNetwork

    network = DISTSNetwork().eval()  # torchmetrics' own metric makes a new one for every pair
    return without_caption(lambda x, x_hat: network(x_hat[None], x[None]).item())


def load_clip(against_caption: bool):
    """100 times the cosine between the decoded picture's embedding and that of the original or of the caption."""
    import open_clip

    model, _, preprocess = open_clip.create_model_and_transforms(CLIP[0], pretrained=CLIP[1])
    tokenizer = open_clip.get_tokenizer(CLIP[0])
    model.eval()

    def embed(x):
        from torchvision.transforms.functional import to_pil_image

        return F.normalize(model.encode_image(preprocess(to_pil_image(x))[None]), dim=-1)

    @torch.no_grad()
    def score(x, x_hat, caption):
        if against_caption and not caption:
            raise ValueError("no caption: a text file beside the picture, of its name, would be one")
        other = F.normalize(model.encode_text(tokenizer([caption])), dim=-1) if against_caption else embed(x)
        return 100 * (embed(x_hat) * other).sum().item()

    return score


def load_mean_iou():
    """Mean over classes of intersection over union, between the segmenter's maps of the original and of the decoded picture."""
    from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

    model = AutoModelForSemanticSegmentation.from_pretrained(SEGMENTER).eval()
    processor = AutoImageProcessor.from_pretrained(SEGMENTER)

    @torch.no_grad()
    def classes(x):
        inputs = processor(images=(255 * x).round().byte(), return_tensors="pt")
        outputs = model(**inputs)
        return processor.post_process_semantic_segmentation(outputs, target_sizes=[x.shape[-2:]])[0]

    return without_caption(lambda x, x_hat: mean_iou(classes(x), classes(x_hat)))


def mean_iou(labels: torch.Tensor, labels_hat: torch.Tensor) -> float:
    """Over the classes that occur in either map."""
    ratios = []
    for label in torch.cat([labels.unique(), labels_hat.unique()]).unique():
        a, b = labels == label, labels_hat == label
        ratios.append(((a & b).sum() / (a | b).sum()).item())
    return sum(ratios) / len(ratios)


def half_shifted_patches(x: torch.Tensor, side: int = 256) -> list[torch.Tensor]:
    """Patches [3, side, side] of a grid from the top left corner on, and of a second grid half a patch further down and right.

    Mentzer et al.: High-Fidelity Generative Image Compression (NeurIPS 2020).
    """
    found = []
    for start in (0, side // 2):
        for top in range(start, x.shape[-2] - side + 1, side):
            found += [x[:, top : top + side, left : left + side] for left in range(start, x.shape[-1] - side + 1, side)]
    return found


def load_fidelity(extractor: str = "inception-v3-compat"):
    """FID and KID of the half-shifted patches of two sets of pictures (torch-fidelity)."""
    import torch_fidelity
    import torch_fidelity.utils

    torch_fidelity.utils.create_feature_extractor(extractor, ["2048"], cuda=False, verbose=False)  # raises here, before any work

    def distances(originals, decoded):
        sets = [
            [(255 * p).round().byte() for x in pictures for p in half_shifted_patches(x)] for pictures in (originals, decoded)
        ]
        if len(sets[0]) < 2:
            raise ValueError(f"{len(sets[0])} patches of 256x256 pixels, two at least are needed")
        figures = torch_fidelity.calculate_metrics(
            input1=Subset(sets[0], range(len(sets[0]))),
            input2=Subset(sets[1], range(len(sets[1]))),
            fid=True,
            kid=True,
            kid_subset_size=min(1000, len(sets[0])),
            feature_extractor=extractor,
            cuda=torch.cuda.is_available(),
            verbose=False,
            save_cpu_ram=True,
        )
        return {
            "fid": figures["frechet_inception_distance"],
            "kid": figures["kernel_inception_distance_mean"],
            "patches": len(sets[0]),
        }

    return distances


# --------------------------------------------------------------------------------------------------------------- the tables


def without_caption(function: Callable) -> Callable:
    """A function of (x, x_hat) as a picture metric's function."""
    return lambda x, x_hat, caption: function(x, x_hat)


def load_vgg_distortion():
    return without_caption(partial(wasserstein_distortion, features=vgg16_features()))


PICTURE_METRICS = {
    "psnr": Metric("PSNR, dB", math.inf, lambda: without_caption(psnr)),
    "ms_ssim": Metric("MS-SSIM", 1, lambda: without_caption(ms_ssim)),
    "wasserstein": Metric("Wasserstein distortion, framelets, 16 px", 0, lambda: without_caption(wasserstein_distortion)),
    "swd": Metric("sliced Wasserstein distance x 1000", 0, lambda: without_caption(sliced_wasserstein)),
    "hf_ratio": Metric("high-frequency power ratio", 1, lambda: without_caption(high_frequency_ratio)),
    "lpips_alex": Metric("LPIPS (AlexNet)", 0, partial(load_lpips, "alex")),
    "lpips_vgg": Metric("LPIPS (VGG16)", 0, partial(load_lpips, "vgg")),
    "dists": Metric("DISTS", 0, load_dists),
    "wasserstein_vgg": Metric("Wasserstein distortion, VGG16, 16 px", 0, load_vgg_distortion),
    "clip_image": Metric(f"CLIP score to original ({CLIP[0]})", 100, partial(load_clip, False)),
    "clip_text": Metric(f"CLIP score to caption ({CLIP[0]})", 100, partial(load_clip, True)),
    "miou": Metric(f"mIoU ({SEGMENTER.rpartition('/')[2]})", 1, load_mean_iou),
}
SET_METRICS = {
    "fid": Metric("FID/256 (half-shifted patches)", 0, load_fidelity),
    "kid": Metric("KID/256 (half-shifted patches)", 0, load_fidelity),
}
WITHOUT_WEIGHTS = ("psnr", "ms_ssim", "wasserstein", "swd", "hf_ratio")


def reason(error: BaseException) -> str:
    """Why a metric has no figure, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"not available: {lines[0] if lines else type(error).__name__}"[:160]
