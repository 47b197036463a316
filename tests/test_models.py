"""Networks as one flat vector: SmallCNN and torchvision's, whatever their size."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small import CLASSES, SHARE, federation
from torch import nn
from torchvision.models import get_model
from torchvision.ops import FrozenBatchNorm2d

from fedssg_helpers import generator, models, server
from fedssg_helpers.methods import METHODS, Method
from fedssg_helpers.models import Backbone, compute_device, resized


def larger(hospitals, size: int):
    """The same federation with images of another size."""
    clients = [replace(own, images=resized(own.images, size)) for own in [*hospitals.clients, hospitals.test]]
    return replace(hospitals, clients=clients[:-1], test=clients[-1])


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "squeezenet1_1"])
def test_a_torchvision_network_is_one_vector_without_batch_statistics_and_chance(name):
    torch.manual_seed(3)
    net, again = Backbone(name)(1, CLASSES, seed=1), Backbone(name)(1, CLASSES, seed=1)
    assert torch.equal(net.weights, again.weights) and torch.initial_seed() == 3
    assert not torch.equal(net.weights, Backbone(name)(1, CLASSES, seed=2).weights)
    assert not any(isinstance(m, nn.BatchNorm2d | nn.Dropout) for m in net.modules())
    assert not list(net.buffers()) and sum(p.numel() for p in net.parameters()) == len(net.weights)
    x = torch.randint(0, 256, (2, 1, 48, 48), dtype=torch.uint8)
    assert net.train()(x).shape == (2, CLASSES) and torch.equal(net(x), net.eval()(x))
    net.weights.zero_()
    assert all((p == 0).all() for p in net.parameters()), "parameters are views"


def test_trained_weights_are_frozen_statistics(monkeypatch):
    trained = get_model("resnet18").state_dict()
    trained = {k: v + 0.5 if "running" in k else v for k, v in trained.items()}
    monkeypatch.setattr(models, "_trained", lambda name, weights: trained)
    made_by = Backbone("resnet18", "IMAGENET1K_V1")
    start = made_by(1, CLASSES)
    before = {name: buffer.clone() for name, buffer in start.named_buffers()}
    assert sum(isinstance(m, FrozenBatchNorm2d) for m in start.modules()) == 20 and len(before) == 80
    assert torch.equal(before["net.bn1.running_mean"], trained["bn1.running_mean"])
    assert torch.equal(start.net.conv1.weight, trained["conv1.weight"])
    channel = server.in_process(federation(), Method(network=made_by), 0)
    run = server.serve(channel, 3, Method(network=made_by), 0, rounds=1)
    net = channel.free.get()
    assert all(torch.equal(buffer, before[name]) for name, buffer in net.named_buffers()), (
        "on the hospitals' side"
    )
    assert len(run.weights) == len(start.weights) and not torch.equal(
        torch.from_numpy(run.weights), start.weights
    )


def test_what_cannot_be_had_is_said(monkeypatch, tmp_path):
    with pytest.raises(
        ValueError, match="network is 'resnet17'; it must be smallcnn or one of torchvision's"
    ):
        Backbone("resnet17")(3, 2)
    with pytest.raises(ValueError, match="weights is 'BEST'; it must be one of IMAGENET1K_V1"):
        Backbone("resnet18", "BEST")(3, 2)

    def offline(*_, **__):
        raise OSError("network is unreachable")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(ValueError, match=r"hub/checkpoints/resnet18-f37072fd.pth is not there.*put it there"):
        Backbone("resnet18", "IMAGENET1K_V1")(3, 2)


def test_large_images_get_small_samples():
    hospitals = larger(federation(), 80)
    shared = server.share(hospitals, SHARE.sharing, 0)
    assert len(shared.pool) and shared.pool.images.shape[-1] == generator.SIDE
    run = server.run(hospitals, replace(SHARE, sharing=replace(SHARE.sharing, pretrain_steps=4)), 0, rounds=1)
    assert run.costs["bytes_samples_up"] == shared.costs["bytes_samples_up"] and not run.missed


def test_resized():
    images = torch.arange(16, dtype=torch.uint8).view(1, 1, 4, 4) * 10
    assert torch.equal(resized(images, 4), images)
    assert resized(images, 2).flatten().tolist() == [25, 45, 105, 125]
    assert resized(images, 9).shape == (1, 1, 9, 9) and resized(images[:0], 9).shape == (0, 1, 9, 9)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_on_a_gpu():
    on_cpu, on_gpu = (
        server.run(federation(), METHODS["fedssg"], 0, rounds=2, compute=c) for c in ("cpu", "cuda")
    )
    assert (on_cpu.confusions != on_gpu.confusions).sum() < 0.2 * on_cpu.confusions.sum()


def test_where_to_compute():
    assert compute_device("cpu") == "cpu" and compute_device("cuda") == "cuda"
    assert torch.device(compute_device("auto")).type in ("cuda", "cpu")
