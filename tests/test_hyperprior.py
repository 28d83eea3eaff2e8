import numpy as np
import pytest
import torch

from diffusers_compress import HyperPrior, ParameterNetwork, embedded_model
from diffusers_compress.coding import logistic
from diffusers_compress.coding.logistic import UNIT
from diffusers_compress.models.hyperprior import LIMIT, ONE, IntegerLinear, code_length, learned, level_of
from diffusers_compress.weights import portable


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = HyperPrior(latent_channels=3, hyper_channels=2, features=8, hidden=16)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.settle()
    return model


@pytest.fixture(scope="module")
def values():
    rng = np.random.default_rng(0)
    dither = 2 * rng.integers(0, UNIT // 2, (3, 18 * 27)) - UNIT // 2 + 1
    return UNIT * rng.integers(-4, 5, (3, 18 * 27)) - dither, dither


def walk(model, z, v, dither, units):
    """All means and indices that the model gives for v."""
    steps = learned(model, z, 18, 27, units, dither, True)
    request, laws = next(steps), []
    while True:
        channel, positions, mean, index = request
        laws.append((channel, positions, mean, index))
        try:
            request = steps.send(v[channel][positions])
        except StopIteration:
            return laws


def test_integer_layers_are_integers_in_every_type():
    torch.manual_seed(0)
    layer = IntegerLinear(133, 64, groups=3)
    with torch.no_grad():
        layer.weight.copy_((ONE * 20 * layer.weight).round().clamp(-LIMIT, LIMIT) / ONE)
        layer.bias.copy_(torch.randint(-LIMIT, LIMIT + 1, layer.bias.shape) / ONE)
        x = torch.randint(-LIMIT, LIMIT + 1, (3, 50, 133))
        exact = layer.double()(x.double())
        weight, bias = (ONE * layer.weight).long(), (ONE * layer.bias).long()
        sums = torch.einsum("gni,goi->gno", x, weight) + ONE * bias
        assert torch.equal(exact.long(), ((sums + ONE // 2) // ONE).clamp(-LIMIT, LIMIT))
        assert exact.abs().max() == LIMIT and exact.unique().numel() > 100
        assert (133 * LIMIT + ONE) * LIMIT < 2**24
        for dtype in (torch.float16, torch.bfloat16):
            assert torch.equal(layer.to(dtype)(x.float()).double(), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_laws_do_not_depend_on_the_type(model, values, dtype):
    import copy

    v, dither = values
    z = np.random.default_rng(0).integers(-5, 6, model.z_shape(18, 27))
    reference = walk(portable(model), z, v, dither, [900, 0, 300])
    other = copy.deepcopy(model).to(dtype)
    assert other.integer_bytes() == model.integer_bytes()
    for a, b in zip(reference, walk(portable(other), z, v, dither, [900, 0, 300]), strict=True):
        assert a[0] == b[0] and all(np.array_equal(p, q) for p, q in zip(a[1:], b[1:]))
    assert {law[0] for law in reference} == {0, 2} and len({int(i) for law in reference for i in law[3]}) > 5


def test_training_and_coding_count_the_same_bits(model, values):
    """The loss, in float32 and in parallel, is the code length of the symbols, one after the other in integers."""
    v, dither = values
    units = [900, 700, 300]
    with torch.no_grad():
        loss = float(model(torch.from_numpy(v).view(1, 3, 18, 27), torch.tensor(units), True))
    copy = portable(model)
    z = copy.side_information(v, units, 18, 27)
    index = copy.z_indices().long().numpy()[:, None]
    side = float(code_length(torch.from_numpy(z.reshape(len(index), -1)).double(), torch.from_numpy(index)).sum())
    bits = side
    for c, positions, mean, index in walk(copy, z, v, dither, units):
        offset = torch.from_numpy(v[c][positions] + dither[c][positions] - mean).double() / UNIT
        bits += float(code_length(offset, torch.from_numpy(index)).sum())
    assert loss == pytest.approx(bits, rel=1e-3)


def test_code_length_is_that_of_the_tables():
    offset = torch.linspace(-6, 6, 13)
    for index in (10, 16, 22):
        tables = logistic.code_length(offset.long().numpy(), np.int64(-UNIT // 32), np.int64(index))
        exact = code_length(offset.double() + 1 / 32, torch.tensor(index).double()).numpy()
        near = exact < 10
        assert near.sum() > 2 and np.abs(tables - exact)[near].max() < 0.1
    # As files have it: a least probability, low bits and escapes
    k = torch.tensor([-900, -70, -36, -17, -3, 0, 1, 4, 16, 18, 40, 300])
    for index in (0, 10, 20, 24, 26):
        tables = logistic.code_length(k.numpy(), np.int64(-UNIT // 32), np.int64(index))
        assert np.abs(code_length(k.double() + 1 / 32, torch.tensor(index).double(), True).numpy() - tables).max() < 1.2


def test_every_parameter_learns(model, values):
    v, _ = values
    model.zero_grad()
    model(torch.from_numpy(v).view(1, 3, 18, 27), torch.tensor([900, 700, 300]), True).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    model.zero_grad()


def test_levels():
    assert level_of(torch.tensor([0, 1, UNIT // 2, UNIT, 2 * UNIT, 10**9])).tolist() == [-65, -65, -8, 0, 8, 88]


def test_saved_and_loaded(model, tmp_path):
    model.save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        again = HyperPrior.from_pretrained(tmp_path, torch_dtype=dtype)
        assert again.integer_bytes() == model.integer_bytes() and again.config.hidden == 16


def test_the_embedded_one_is_settled():
    trained = HyperPrior.from_pretrained(embedded_model(), subfolder="hyperprior")
    for name, parameter in trained.named_parameters():
        if not name.startswith("h_a"):
            assert torch.equal((ONE * parameter).round().clamp(-LIMIT, LIMIT), ONE * parameter), name


def test_an_untrained_parameter_network_changes_nothing():
    network = ParameterNetwork(latent_channels=4)
    scales, shifts, level = portable(network).choose(torch.randn(4, 9, 7), {"mean": [0.0] * 4, "std": [1.0] * 4}, 0.5)
    assert scales == shifts == [0.0] * 4 and level == 0
