import numpy as np
import pytest
import torch

from diffusers_compress.codecs.perco.format import PRESETS
from diffusers_compress.models import hyper_encoder
from diffusers_compress.models.hyper_encoder import DEAD, HyperEncoder, spread


def make(**options):
    torch.manual_seed(0)
    return HyperEncoder(
        **{"latent_channels": 4, "stride": 2, "codebook_size": 16, "width": 8, "out_channels": 6, "codebook_dim": 3} | options
    )


def test_the_published_sizes_are_met():
    """Careil et al. say 4,080,128 and 5,868,032 parameters, without the quantizer."""
    for preset, count in (("0.1250", 4_080_128), ("0.0019", 5_868_032)):
        backbone = HyperEncoder(4, *PRESETS[preset]).backbone
        assert sum(parameter.numel() for parameter in backbone.parameters()) == count


def test_presets_have_their_bits_per_pixel():
    for name, (stride, size) in PRESETS.items():
        assert np.log2(size) / (8 * stride) ** 2 == pytest.approx(float(name), abs=1e-4)


@pytest.mark.parametrize("stride", [1, 2, 4, 8])
@pytest.mark.parametrize("h, w", [(1, 1), (8, 8), (9, 17)])
def test_grids_cover_latents_of_any_size(stride, h, w):
    model = make(stride=stride).eval()
    indices = model.encode(torch.randn(2, 4, h, w))
    assert list(indices.shape[1:]) == [-(-h // stride), -(-w // stride)] == list(model.grid_shape(h, w))
    assert model.decode(indices, h, w).shape == (2, 6, h, w)


def test_features_are_constant_within_a_cell():
    z_hat = torch.arange(6.0).reshape(1, 1, 2, 3)
    assert spread(z_hat, 2, 3, 5)[0, 0].tolist() == [[0, 0, 1, 1, 2], [0, 0, 1, 1, 2], [3, 3, 4, 4, 5]]


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_indices_are_those_of_the_nearest_codes(distance):
    model = make(distance=distance).eval()
    points = model.analyse(torch.randn(1, 4, 16, 16)).double()
    codebook = model.codebook.double()
    if distance == "cosine":
        distances = -torch.nn.functional.cosine_similarity(points[..., None, :], codebook, dim=-1)
    else:
        distances = (points[..., None, :] - codebook).norm(dim=-1)
    chosen = distances.gather(-1, model.nearest(points.float())[..., None])[..., 0]
    assert (chosen <= distances.min(-1).values + 1e-4).all()  # floats decide between codes that are as near


@pytest.mark.parametrize("stride", [1, 2])
def test_no_other_code_of_a_cell_would_give_a_better_estimate(stride, monkeypatch):
    """After a search where bits cost nothing, by trying them all; cells at the border, where the estimate repeats codes, count as if
    it did not."""
    monkeypatch.setattr(hyper_encoder, "SEARCH_ROUNDS", 30)
    monkeypatch.setattr(HyperEncoder, "bits", lambda self, indices: torch.zeros(1, 16))
    model, x_0 = make(stride=stride, estimates_latent=True).eval(), torch.randn(1, 4, 6 * stride, 5 * stride)

    def error(indices):
        return (model.estimate(model.features(model.codes()[indices]), *x_0.shape[2:]) - x_0).square().sum()

    with torch.no_grad():
        nearest, found = model.nearest(model.analyse(x_0)), model.encode(x_0)
        best = error(found)
        assert best < 0.98 * error(nearest)
        for i in range(1, 5):
            for j in range(1, 4):
                for code in range(16):
                    other = found.clone()
                    other[0, i, j] = code
                    assert error(other) > best - 1e-3


def test_the_search_spares_codes_that_are_rare_in_a_picture():
    model, x_0 = make(estimates_latent=True).eval(), torch.randn(1, 4, 48, 48)

    def entropy(indices):
        share = torch.bincount(indices.flatten(), minlength=16) / indices.numel()
        return float(torch.special.entr(share).sum())

    priced, bits = model.encode(x_0), model.bits
    model.bits = lambda indices: 0 * bits(indices)
    assert entropy(priced) < entropy(model.encode(x_0)) - 0.01


def test_codes_learn_from_the_search_what_is_made_of_them():
    model, x_0 = make(estimates_latent=True).train(), torch.randn(4, 4, 8, 8)
    out = model(x_0, searched=True)
    assert torch.equal(out.indices, model.encode(x_0)) and model.usage.sum() == 0
    (out.estimate - x_0).square().mean().backward(retain_graph=True)
    assert model.codebook.grad.abs().sum() > 0 and model.project_in.weight.grad is None
    out.loss.backward()
    assert model.project_in.weight.grad.abs().sum() > 0  # the backbone learns to guess the indices


def test_the_gradient_goes_straight_through():
    model = make().eval()
    points = model.analyse(torch.randn(1, 4, 8, 8)).detach().requires_grad_()
    model.analyse = lambda x_0: points
    out = model(None)
    assert torch.allclose(out.z_hat, model.features(model.codes()[out.indices]), atol=1e-6)
    out.z_hat.sum().backward()
    expected = model.project_out.weight.sum(0).expand_as(points)
    assert torch.allclose(points.grad, expected, atol=1e-5)


def test_training_draws_codes_and_points_together_and_keeps_codes_in_use():
    model = make(codebook_size=32).train()
    optimizer, generator = torch.optim.Adam(model.parameters(), 1e-2), torch.Generator().manual_seed(0)
    losses = []
    for _ in range(60):
        loss = model(torch.randn(4, 4, 8, 8, generator=generator)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-10:]) < 0.5 * losses[0] and 6 < model.perplexity() <= 32


def test_codes_out_of_use_are_revived():
    model = make().train()
    with torch.no_grad():
        model.codebook[:] = 1e3 + torch.arange(16)[:, None]  # far from all points: only the nearest is used
        model.usage[:] = 1.0
    x = torch.randn(8, 4, 8, 8)
    assert model.encode(x).unique().numel() == 1
    for _ in range(130):
        model.count(model.encode(x), model.analyse(x))
    assert model.encode(x).unique().numel() > 8 and model.usage.min() >= DEAD * 0.9


def test_nothing_is_counted_when_not_training():
    model = make().eval()
    model(torch.randn(1, 4, 8, 8))
    assert model.usage.sum() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_no_type_changes_the_law(dtype, tmp_path):
    model = make(codebook_size=64)
    model.settle(torch.rand(64))
    model.save_pretrained(tmp_path)
    narrow = HyperEncoder.from_pretrained(tmp_path, torch_dtype=dtype)
    assert narrow.dtype == dtype and narrow.probability_model().identity() == model.probability_model().identity()
    assert model.probability_model().frequency.min() >= 1 and np.abs(model.probability_model().places).max() == 127


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="not 3 and 'euclidean'"):
        make(stride=3)
    with pytest.raises(ValueError, match="not 2 and 'angle'"):
        make(distance="angle")
