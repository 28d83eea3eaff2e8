"""Metrics that need weights: LPIPS, DISTS, CLIP score, segmentation, FID and KID. Their networks go where the pictures are."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch.utils.data import Subset

from diffusers_compress.metrics.wasserstein import vgg16_features, wasserstein_distortion

CLIP = ("ViT-B-32-quickgelu", "openai")  # open_clip: model, weights
SEGMENTER = "nvidia/segformer-b0-finetuned-ade-512-512"  # Hub id or folder


def load_lpips(net: str):
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    metric = LearnedPerceptualImagePatchSimilarity(net_type=net, normalize=True).eval()  # normalize: samples are in [0, 1]
    return without_caption(lambda x, x_hat: metric.to(x.device)(x_hat[None], x[None]).item())


def load_dists():
    from torchmetrics.functional.image.dists import DISTSNetwork

    network = DISTSNetwork().eval()  # torchmetrics' own metric makes a new one for every pair
    return without_caption(lambda x, x_hat: network.to(x.device)(x_hat[None], x[None]).item())


def load_clip(against_caption: bool):
    """100 times the cosine between the decoded picture's embedding and that of the original or of the caption."""
    import open_clip

    model, _, preprocess = open_clip.create_model_and_transforms(CLIP[0], pretrained=CLIP[1])
    tokenizer = open_clip.get_tokenizer(CLIP[0])
    model.eval()

    def embed(x):
        from torchvision.transforms.functional import to_pil_image

        return F.normalize(model.encode_image(preprocess(to_pil_image(x.cpu()))[None].to(x.device)), dim=-1)

    @torch.no_grad()
    def score(x, x_hat, caption):
        if against_caption and not caption:
            raise ValueError("no caption: a text file beside the picture, of its name, would be one")
        model.to(x.device)
        other = F.normalize(model.encode_text(tokenizer([caption]).to(x.device)), dim=-1) if against_caption else embed(x)
        return 100 * (embed(x_hat) * other).sum().item()

    return score


def load_mean_iou():
    """Mean over classes of intersection over union, between the segmenter's maps of the original and of the decoded picture."""
    from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

    model = AutoModelForSemanticSegmentation.from_pretrained(SEGMENTER).eval()
    processor = AutoImageProcessor.from_pretrained(SEGMENTER)

    @torch.no_grad()
    def classes(x):
        inputs = processor(images=(255 * x).round().byte().cpu(), return_tensors="pt").to(x.device)
        outputs = model.to(x.device)(**inputs)
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


def without_caption(function: Callable) -> Callable:
    """A function of (x, x_hat) as a picture metric's function."""
    return lambda x, x_hat, caption: function(x, x_hat)


def load_vgg_distortion():
    return without_caption(partial(wasserstein_distortion, features=vgg16_features()))
