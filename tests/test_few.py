"""One image, or none: every public function that takes images works, or says in the helpers' own words why not."""

from __future__ import annotations

import importlib
import inspect
import warnings

import matplotlib
import numpy as np
import pytest
import torch
from test_odd import in_our_words

from fedssg_helpers import (
    checks,
    client,
    devices,
    dpmeans,
    dpsgd,
    exchange,
    files,
    generator,
    metrics,
    models,
    partition,
    plots,
    privacy,
    protection,
    sharing,
)
from fedssg_helpers.data import ImageSet
from fedssg_helpers.keys import rng
from fedssg_helpers.methods import Sharing
from fedssg_helpers.partition import Client, Federation

MODULES = "devices files partition models generator protection dpsgd dpmeans sharing client checks exchange metrics privacy plots"
TAKE = set(
    "images image samples data client clients pool labels x drawn own picture rows donor outside".split()
)


class Few:
    """What functions take, with so many images of 16 pixels."""

    def __init__(self, number: int):
        random = np.random.default_rng(0)
        self.n, self.random = number, rng(0, "few")
        self.images = torch.from_numpy(random.integers(0, 256, (number, 3, 16, 16), dtype=np.uint8))
        self.labels = self.zeros = torch.zeros(number, dtype=torch.int64)
        self.client = Client(self.images, self.labels, self.zeros)
        self.pool = sharing.Pool(self.images, self.labels, self.zeros, self.zeros)
        arrays = self.images.numpy(), *(self.zeros.numpy().copy() for _ in range(3))
        self.set = ImageSet("few", *arrays, ("a", "b"), ("c",), "", False)
        self.federation = Federation([self.client], self.client, ("a", "b"), ("c",), "few")
        self.net = models.SmallCNN(3, 2)
        self.wanted = np.zeros((2, 1), int)
        self.axis = matplotlib.figure.Figure().add_subplot()


def vae():
    return generator.VAE(3, 16, 4, torch.Generator())


CASES = {
    "devices.jpeg": lambda f: [devices.jpeg(image, 80) for image in f.images.numpy()],
    "devices.render": lambda f: devices.apply(f.images.numpy(), f.zeros.numpy()),
    "devices.apply": lambda f: devices.apply(f.images.numpy(), f.zeros.numpy()),
    "devices.assign": lambda f: devices.assign(f.labels.numpy(), f.zeros.numpy()),
    "files.pick": lambda f: files.pick(f.images.numpy(), np.arange(f.n)),
    "partition.federate": lambda f: partition.federate(f.set),
    "partition.clients_of": lambda f: partition.clients_of(f.set, [np.arange(f.n)]),
    "partition.split": lambda f: partition.split(f.set),
    "partition.by_device": lambda f: partition.by_device(f.set, np.arange(f.n)),
    "partition.hospitals": lambda f: partition.hospitals(f.set, np.arange(f.n), 1),
    "models.scale": lambda f: models.scale(f.images),
    "models.unscale": lambda f: models.unscale(models.scale(f.images)),
    "models.normalise": lambda f: models.normalise(models.scale(f.images), torch.ones(2, 3)),
    "models.augment": lambda f: models.augment(f.images, 5),
    "models.plausible_orientations": lambda f: models.plausible_orientations(f.images),
    "models.resized": lambda f: models.resized(f.images, 24),
    "models.predict": lambda f: models.predict(f.net, f.images),
    "generator.chances": lambda f: generator.chances(f.labels, 0.5),
    "generator.fit_linear": lambda f: generator.fit_linear(f.images, f.labels, 4, f.random),
    "generator.loss": lambda f: generator.loss(vae(), models.scale(f.images), torch.zeros(f.n, 4)),
    "generator.train": lambda f: generator.train(vae(), f.images, f.labels, 1, f.random),
    "generator.fit_density": lambda f: generator.fit_density(vae(), f.images, f.zeros),
    "generator.fit": lambda f: generator.fit(f.images, f.labels, f.zeros, f.random),
    "protection.distances": lambda f: protection.distances(f.images, f.images),
    "protection.apart": lambda f: protection.apart(f.images),
    "protection.limits": lambda f: protection.limits(f.images, f.zeros, 0.05),
    "protection.inliers": lambda f: protection.inliers(f.images, f.zeros, 2.5),
    "protection.redraw": lambda f: protection.redraw(f.images, f.images, 0.0, [0], lambda n: f.images[:n]),
    "protection.add_noise": lambda f: protection.add_noise(f.images, 5, f.random),
    "dpsgd.fit_private": lambda f: dpsgd.fit_private(f.images, f.labels, 2, 10.0, f.random, steps=1),
    "dpmeans.DPMeans": lambda f: dpmeans.DPMeans()(f.images, f.labels, f.zeros, f.random)(0, 1, f.random),
    "sharing.reports": lambda f: sharing.reports([f.client], 2, 1),
    "sharing.distribute": lambda f: sharing.distribute(f.wanted, f.pool, 0, 0),
    "sharing.packed": lambda f: sharing.unpacked(sharing.packed(f.images), 3, 16),
    "sharing.channel_sums": lambda f: sharing.channel_sums(f.client, 1),
    "client.log_prior": lambda f: client.log_prior(f.labels, 2),
    "client.train_local": lambda f: client.train_local(
        f.net, f.net.weights.clone(), f.images, f.labels, steps=1, lr=0.1, random=f.random
    ),
    "client.steps_of": lambda f: client.steps_of(f.n),
    "client.synthesise": lambda f: client.synthesise(f.client, f.wanted, 0, 0),
    "client.small": lambda f: client.small(f.client),
    "client.chosen": lambda f: client.chosen(f.client, f.wanted + 1, f.random),
    "client.copies": lambda f: client.copies(f.client, f.wanted + 1, f.random),
    "checks.weights_refusal": lambda f: checks.weights_refusal(f.net.weights, f.net.weights, f.n, f.n),
    "checks.strangeness": lambda f: checks.strangeness(f.pool),
    "checks.agreement": lambda f: checks.agreement(f.pool, 2),
    "checks.implausible_sources": lambda f: checks.implausible_sources(f.pool, 2),
    "exchange.pretrain": lambda f: exchange.pretrain(f.net, f.pool, 4, 0),
    "metrics.confusions": lambda f: metrics.confusions(f.labels, f.labels, f.zeros, 2, 1),
    "metrics.calibration_error": lambda f: metrics.calibration_error(np.zeros((f.n, 2)), f.labels),
    "metrics.best_temperature": lambda f: metrics.best_temperature(np.zeros((f.n, 2)), f.labels),
    "privacy.subspace": lambda f: privacy.subspace(f.images),
    "privacy.off_subspace": lambda f: privacy.off_subspace(f.images, (torch.zeros(768), torch.zeros(768, 2))),
    "privacy.membership": lambda f: privacy.membership([f.client], f.client, f.pool),
    "privacy.pairs": lambda f: privacy.pairs([f.client], f.client, f.pool),
    "privacy.resemblance": lambda f: privacy.resemblance(f.images, f.images),
    "privacy.plant": lambda f: privacy.plant(f.client, privacy.canary((3, 16, 16), f.random), 0, 0),
    "privacy.canaries": lambda f: privacy.canaries(
        [f.client], f.client, sharing.Plan(f.wanted[None], f.wanted[None]), 0, Sharing()
    ),
    "privacy.taught": lambda f: privacy.taught(f.pool, f.federation, 0, 4),
    "plots.to_display": lambda f: [plots.to_display(image) for image in f.images],
    "plots.strip": lambda f: plots.strip(f.axis, f.images),
    "plots.wall": lambda f: plots.wall(f.axis, {"few": f.images}),
    "plots.archive": lambda f: plots.archive(f.axis, f.client, ("a", "b"), ("c",), f.random),
}  # fmt: skip


def test_every_public_function_that_takes_images_has_a_case():
    found = set()
    for name in MODULES.split():
        module = importlib.import_module(f"fedssg_helpers.{name}")
        for label, function in inspect.getmembers(module, inspect.isfunction):
            own = inspect.unwrap(function).__module__ == module.__name__ and not label.startswith("_")
            if own and TAKE & set(inspect.signature(function).parameters):
                found.add(f"{name}.{label}")
    assert found - {"plots.heat"} <= set(CASES), found - set(CASES)


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("name", CASES)
def test_it_works_or_says_why_not(name, number):
    try:
        with warnings.catch_warnings(action="error"):
            CASES[name](Few(number))
    except ValueError as error:
        assert in_our_words(error), f"{type(error).__name__}: {error}"
