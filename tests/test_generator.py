"""The generator: closed form, objective, training, densities, samples."""

from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedssg_helpers import generator
from fedssg_helpers.keys import rng
from fedssg_helpers.models import augment, plausible_orientations, scale, unscale


def pictures(number: int, channels: int = 3, size: int = 16, rank: int = 3, seed: int = 0) -> torch.Tensor:
    """Images of low rank, uint8 (n, C, H, H): mixtures of `rank` patterns that no flip or quarter turn changes."""
    random = rng(seed, "test pictures")
    patterns = torch.from_numpy(random.standard_normal((rank, channels, size, size)))
    patterns = torch.stack([augment(patterns, i) for i in range(8)]).mean(0) * 40
    mix = torch.from_numpy(random.uniform(-1, 1, (number, rank)))
    return (127 + torch.einsum("nr,rchw->nchw", mix, patterns)).clamp(0, 255).round().to(torch.uint8)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(rng(seed, "test noise").standard_normal(shape, dtype=np.float32))


def labels(number: int, classes: int = 2) -> torch.Tensor:
    return torch.arange(number) % classes


@torch.no_grad()
def error(net: generator.VAE, images: torch.Tensor) -> float:
    return float((net.decode(net.encode(scale(images))[0]) - scale(images)).square().mean())


def test_closed_form_is_principal_component_analysis():
    images = pictures(80, rank=3)
    net = generator.fit_linear(images, torch.zeros(80, dtype=torch.int64), 3, rng(0, "fit"), power=1.0)
    x = scale(images).flatten(1).double()
    mu = x.mean(0)
    _, singular, axes = torch.linalg.svd(x - mu, full_matrices=False)
    expected = mu + (x - mu) @ axes[:3].T @ axes[:3]
    got = net.decode(net.encode(scale(images))[0]).flatten(1).double()
    assert (got - expected).abs().max() < 0.02  # noise above 0 draws the reconstructions a little to the mean
    variance = singular[:3] ** 2 / 80
    left = (x - mu).square().sum() / 80 - variance.sum()
    sigma2 = left / (x.shape[1] - 3)  # Tipping & Bishop 1999, eq. 8
    torch.testing.assert_close(
        net.decode_matrix.double().square().sum(0), variance - sigma2, rtol=1e-3, atol=1e-5
    )
    torch.testing.assert_close(net.log_variance.double().exp(), sigma2 / variance, rtol=0.02, atol=1e-7)


def test_error_falls_with_the_number_of_dimensions():
    images = pictures(100, rank=20)
    found = [
        error(generator.fit_linear(images, labels(100), q, rng(0, "fit")), images) for q in (1, 4, 10, 20)
    ]
    assert all(a > b for a, b in zip(found, found[1:]))
    assert found[-1] < 0.02 * found[0]


@torch.no_grad()
def test_closed_form_is_an_optimum_of_the_loss():
    images = pictures(100, rank=12)
    net = generator.fit_linear(images, labels(100), 6, rng(0, "fit"), power=1.0)
    x, epsilon = torch.cat([augment(scale(images), i) for i in range(8)]), noise(800, 6)
    best = float(generator.loss(net, x, epsilon))
    for parameter in (net.decode_matrix, net.encode_matrix, net.log_variance):
        for factor in (0.9, 1.1):
            with torch.no_grad():
                kept = parameter.clone()
                parameter.mul_(factor)
                assert float(generator.loss(net, x, epsilon)) > best
                parameter.copy_(kept)


def test_everything_is_keyed():
    images, cells = pictures(60, rank=8), labels(60)

    def samples(seed):
        model = generator.fit(images, cells, cells, rng(seed, "fit"), latent=10, steps=3)
        return model.sample(1, 5, rng(seed, "sample"))

    first = samples(3)
    torch.rand(3)  # the global generator's state must not matter, nor must threads
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    with ThreadPoolExecutor(3) as threads:
        others = list(threads.map(samples, (3, 4, 3, 3)))
    assert [torch.equal(first, x) for x in others] == [True, False, True, True]
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


@pytest.mark.parametrize("shape", [(40, 300), (300, 40)])
def test_principal_axes_are_those_of_torch(shape):
    """Bit for bit what `torch.svd_lowrank` gives where nobody else draws from the global generator."""
    x = noise(*shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        _, singular, axes = torch.svd_lowrank(x, 12 + 8, niter=2)
    variance, found = generator._principal(x, 12, 7)
    assert torch.equal(variance, singular[:12] ** 2 / len(x)) and torch.equal(found, axes[:, :12])


@torch.no_grad()
def test_loss_is_the_formula():
    images = pictures(12, rank=6)
    net = generator.fit_linear(pictures(50, rank=6), labels(50), 4, rng(0, "fit"))
    x, epsilon = scale(images), noise(12, 4)
    mean, log_variance = net.encode(x)
    posterior = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    y = net.decode(mean + posterior.stddev * epsilon)
    values = x[0].numel()
    sigma = (y - x).square().mean().sqrt()
    likelihood = torch.distributions.Normal(y, sigma).log_prob(x).sum() / len(x)
    kl = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum() / len(x)
    constant = values / 2 * (1 + np.log(2 * np.pi))
    for beta in (0.0, 1.0, 3.0):
        expected = float(-likelihood + beta * kl - constant)
        assert float(generator.loss(net, x, epsilon, beta)) == pytest.approx(expected, rel=1e-4)


def test_training_lowers_the_loss():
    images = pictures(80, rank=10)
    net = generator.VAE(3, 16, 5, torch.Generator().manual_seed(0))
    torch.nn.init.normal_(net.decode_matrix, std=0.02, generator=torch.Generator().manual_seed(1))
    before = float(generator.loss(net, scale(images), noise(80, 5)).detach())
    generator.train(net, images, labels(80), 40, rng(0, "train"), lr=3e-3)
    assert float(generator.loss(net, scale(images), noise(80, 5)).detach()) < before - 10


def test_an_untrained_residual_changes_nothing():
    images = pictures(50, rank=6)
    net = generator.fit_linear(images, labels(50), 6, rng(0, "fit"))
    expected = error(net, images)
    net.linear = False
    assert error(net, images) == expected
    for part in net.parameters():
        part.requires_grad_(True)
    generator.loss(net, scale(images), noise(50, 6)).backward()
    assert net.decode_residual[-2].weight.grad.abs().sum() > 0  # ... but it can learn


def test_small_cells_are_not_generated():
    images, least = pictures(40, rank=6), generator.MINIMUM
    cells = torch.cat(
        [torch.full((least,), 2), torch.full((least - 1,), 5), torch.zeros(41 - 2 * least, dtype=torch.int64)]
    )
    model = generator.fit(images, cells, cells, rng(0, "fit"), latent=5)
    assert sorted(model.mean) == sorted(model.factor) == [0, 2]
    with pytest.raises(ValueError, match=f"cell 5 .*{least}"):
        model.sample(5, 1, rng(0, "sample"))


def test_nothing_to_generate_is_no_error():
    model = generator.fit(pictures(4), labels(4), labels(4), rng(0, "fit"), latent=3)
    assert model.mean == {}


def test_temperature_zero_is_the_mean():
    images, cells = pictures(60, rank=8), labels(60)
    model = generator.fit(images, cells, cells, rng(0, "fit"), latent=8)
    flat = model.sample(1, 3, rng(0, "sample"), temperature=0.0)
    expected = unscale(model.net.decode(model.mean[1][None]).detach())
    assert torch.equal(flat, expected.expand(3, -1, -1, -1))
    spread = [model.sample(1, 200, rng(0, "sample"), t).float().std(0).mean() for t in (0.3, 0.9)]
    assert spread[0] < spread[1]
    with pytest.raises(ValueError, match="temperature"):
        model.sample(1, 3, rng(0, "sample"), temperature=-1.0)


def test_density_is_shrunk_and_follows_the_cells():
    bright, dark = pictures(200, rank=4, seed=1), pictures(20, rank=4, seed=1) // 3
    images, cells = torch.cat([bright, dark]), torch.tensor([0] * 200 + [7] * 20)
    net = generator.fit_linear(images, cells, 4, rng(0, "fit"))
    own, shrunk = (generator.fit_density(net, images, cells, shrink) for shrink in (0.0, 30.0))
    scatter = {
        s: [torch.trace(m.factor[c] @ m.factor[c].T) for c in (0, 7)]
        for s, m in (("own", own), ("30", shrunk))
    }
    assert scatter["own"][1] < scatter["30"][1] < scatter["30"][0] < scatter["own"][0] * 1.01
    samples = [shrunk.sample(c, 100, rng(0, "sample")).float().mean() for c in (0, 7)]
    assert samples[0] == pytest.approx(float(bright.float().mean()), abs=5)
    assert samples[1] == pytest.approx(float(dark.float().mean()), abs=5)
    assert generator.trust(30) == 0.5 and generator.trust(270) == 0.9


def test_samples_come_in_the_orientations_of_the_images():
    images, cells = pictures(60), labels(60)
    images[:, :, :8] //= 4  # dark above, bright below: flipping left and right is all that may stay
    assert plausible_orientations(images) == [0, 4]
    for orientations, upright in ((None, True), ([0, 2], False)):
        model = generator.fit(
            images, cells, cells, rng(0, "fit"), latent=5, steps=2, orientations=orientations
        )
        samples = model.sample(0, 50, rng(0, "sample")).float()
        assert (samples[:, :, :8].mean() < 0.5 * samples[:, :, 8:].mean()) == upright


@pytest.mark.parametrize(("channels", "size"), [(1, 16), (1, 28), (3, 16), (3, 30)])
def test_shapes(channels, size):
    images, cells = pictures(30, channels, size), labels(30)
    model = generator.fit(images, cells, cells, rng(0, "fit"), steps=2)
    samples = model.sample(0, 7, rng(0, "sample"))
    assert samples.shape == (7, channels, size, size) and samples.dtype == torch.uint8
    assert model.sample(0, 0, rng(0, "sample")).shape == (0, channels, size, size)


def test_hardly_any_or_all_equal_images():
    for images in (pictures(8), torch.full((20, 3, 16, 16), 90, dtype=torch.uint8)):
        zero = torch.zeros(len(images), dtype=torch.int64)
        for steps in (0, 2):
            model = generator.fit(images, zero, zero, rng(0, "fit"), steps=steps)
            samples = model.sample(0, 4, rng(0, "sample"))
            assert abs(float(samples.float().mean() - images.float().mean())) < 30


@pytest.mark.parametrize(
    ("images", "marks", "latent", "message"),
    [
        (torch.zeros(9, 3, 16, 16), labels(9), 4, "float32"),
        (torch.zeros(9, 3, 16, 20, dtype=torch.uint8), labels(9), 4, "square"),
        (torch.zeros(9, 16, 16, dtype=torch.uint8), labels(9), 4, "shape"),
        (torch.zeros(9, 3, 16, 16, dtype=torch.uint8), labels(8), 4, "one label"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), labels(1), 4, "at least two"),
        (torch.zeros(9, 3, 16, 16, dtype=torch.uint8), labels(9), 0, "latent is 0"),
        (torch.zeros(9, 1, 16, 16, dtype=torch.uint8), labels(9), 256, "1 to 255"),
    ],
)
def test_impossible_input_is_named(images, marks, latent, message):
    with pytest.raises(ValueError, match=message):
        generator.fit_linear(images, marks, latent, rng(0, "fit"))


def test_the_part_is_fit_and_sample():
    images, cells = pictures(60, rank=8), labels(60)
    part = generator.ClosedForm(latent=10, steps=2, temperature=0.5)
    assert pickle.loads(pickle.dumps(part)) == part and hash(part) == hash(replace(part))
    sample = part(images, cells, cells, rng(0, "fit"), plausible_orientations(images))
    model = generator.fit(images, cells, cells, rng(0, "fit"), latent=10, steps=2)
    assert torch.equal(sample(1, 5, rng(0, "s")), model.sample(1, 5, rng(0, "s"), 0.5))
    for wrong in ({"latent": 0}, {"steps": -1}, {"temperature": -0.1}, {"temperature": np.nan}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            generator.ClosedForm(**wrong)
