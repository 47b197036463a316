"""Flower: the same numbers as in one process, on every engine, and what happens when hospitals fail or lie."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import ssl
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fedssg_helpers import course, experiment, rounds, sharing
from fedssg_helpers.data import DataError
from fedssg_helpers.partition import Client
from fedssg_helpers.rounds import Faults, Method

QUICK = replace(experiment.METHODS["fedssg"], pretrain_steps=20)


@pytest.fixture(scope="module")
def flower():
    pytest.importorskip("flwr", reason="needs Flower: pip install -e '.[flower]'")
    from flwr.supercore.task_identity import TaskIdentity

    from fedssg_helpers import flower

    TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1  # messages can then be made outside a run
    return flower


@pytest.fixture(scope="module")
def three():
    """Three hospitals of 100 phantoms each, 90 test images."""
    federation = experiment.federation("phantom", "", 3, 0.3, 0)

    def some(client, number):
        rows = torch.from_numpy(np.random.default_rng(0).permutation(len(client))[:number])
        return Client(client.images[rows], client.labels[rows], client.device[rows])

    return replace(federation, clients=[some(c, 100) for c in federation.clients], test=some(federation.test, 90))


def grid_of(flower, folder, hospitals, change=lambda k, kind, content: content):
    """A grid without network or processes: nodes with random ids that appear one by one, replies in random order.

    `change` may replace a hospital's answer, or raise (an error reply) or give None (silence).
    """
    from flwr.app import Context, Error, Message, RecordDict

    app, calls = flower.app_of_hospitals(str(folder)), []
    nodes = {random.getrandbits(60): k for k in range(hospitals)}
    contexts = {node: Context(1, node, {"partition-id": k, "num-partitions": hospitals}, RecordDict(), {})
                for node, k in nodes.items()}

    class Grid:
        asked = calls

        def get_node_ids(self):
            calls.append("nodes")
            return list(nodes)[:calls.count("nodes") - 1]

        def send_and_receive(self, messages, *, timeout=None):
            replies = []
            for message in messages:
                node, kind = message.metadata.dst_node_id, message.metadata.message_type
                calls.append((kind, nodes[node]))
                try:
                    content = change(nodes[node], kind, app(message, contexts[node]).content)
                    replies += [] if content is None else [Message(content, reply_to=message)]
                except Exception as error:
                    replies.append(Message(Error(2, f"{type(error)}:<'{error}'>"), reply_to=message))
            random.shuffle(replies)
            return replies

    return Grid()


def serve(flower, federation, folder, method, seed, change=lambda k, kind, content: content, **settings):
    flower.save_hospitals(federation, folder)
    grid = grid_of(flower, folder, len(federation.clients), change)
    return flower.serve(grid, method, seed, hospitals=len(federation.clients), **settings), grid


def same(one, other) -> None:
    """Two runs agree in all that both engines measure."""
    assert np.array_equal(one.weights, other.weights)
    assert np.array_equal(one.confusions[-1], other.confusions[-1]) and one.rounds[-1] == other.rounds[-1]
    assert np.array_equal(one.took_part, other.took_part) and one.missed == other.missed
    for name in ("bytes_up", "bytes_samples_up", "bytes_samples_down"):
        assert one.costs[name] == other.costs[name], name


# ---------------------------------------- without Flower


def test_without_flower_the_error_names_the_cure_and_the_rest_works():
    code = ("import sys; sys.modules['flwr'] = None\n"
            "from fedssg_helpers import experiment, explore, pages, plots\n"
            "try:\n    import fedssg_helpers.flower\nexcept ImportError as error:\n    print(error)")
    done = subprocess.run([sys.executable, "-c", code], cwd=course.ROOT, capture_output=True, text=True, timeout=120)
    assert "pip install -e '.[flower]'" in done.stdout, done.stderr


# ---------------------------------------- in this process


def test_a_hospitals_file_is_all_of_its_own_and_nothing_else(flower, three, tmp_path):
    found = [flower.load_hospital(file) for file in flower.save_hospitals(three, tmp_path)]
    for mine, client in zip(found, three.clients):
        for part in flower.PARTS:
            assert torch.equal(getattr(mine.clients[0], part), getattr(client, part))
        assert len(mine.clients) == 1 and (mine.classes, mine.devices) == (three.classes, three.devices)
    tests = Client.joined([mine.test for mine in found])
    rows = torch.cat([torch.arange(len(three.test))[k::3] for k in range(3)])
    assert torch.equal(tests.images, three.test.images[rows]) and torch.equal(tests.labels, three.test.labels[rows])


@pytest.mark.parametrize("change", [{"images": np.zeros((3, 4), np.uint8)}, {"labels": np.zeros(2, np.int64)},
                                    {"test_images": np.zeros((5, 3, 28, 28), np.float32)}, {"classes": None}])
def test_a_bad_file_is_named(flower, three, tmp_path, change):
    file = flower.save_hospitals(three, tmp_path)[0]
    with np.load(file) as arrays:
        np.savez(file, **{name: value for name, value in (dict(arrays) | change).items() if value is not None})
    with pytest.raises(DataError, match=r"data\.npz"):
        flower.load_hospital(file)


@pytest.mark.parametrize("name", ["fedavg", "fedssg"])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_same_bits_as_in_one_process(flower, three, tmp_path, name, seed):
    method = QUICK if name == "fedssg" else experiment.METHODS[name]
    ours = rounds.run(three, method, seed, rounds=3)
    theirs, _ = serve(flower, three, tmp_path, method, seed, rounds=3)
    same(theirs, ours)
    assert theirs.confusions.sum() == len(three.test)
    assert theirs.costs["bytes_down"] == ours.costs["bytes_down"]


@pytest.mark.parametrize("change", [{"mu": 0.1, "server_momentum": 0.6}, {"aggregate": "median", "balanced": True},
                                    {"aggregate": "clip", "drop": 0.3, "reject": 0.05, "grain": 2.0},
                                    {"deal": False, "share": 0.3, "decay": True}])
def test_every_option_travels(flower, three, tmp_path, change):
    method = replace(QUICK, **change)
    same(serve(flower, three, tmp_path, method, 0, rounds=2)[0], rounds.run(three, method, 0, rounds=2))


def test_device_statistics_agree_up_to_the_order_of_sums(flower, three, tmp_path):
    method = replace(QUICK, device_statistics=True)
    theirs, _ = serve(flower, three, tmp_path, method, 0, rounds=2)
    assert np.allclose(theirs.weights, rounds.run(three, method, 0, rounds=2).weights, atol=1e-4)
    have = sharing.reports(three.clients, len(three.classes), len(three.devices) + 1)  # the last: of nobody
    own = torch.stack([sharing.styles([client], len(three.devices) + 1) for client in three.clients])
    joint = sharing.styles(three.clients, len(three.devices) + 1)
    assert torch.allclose(flower.joint_styles(have, own), joint, atol=1e-6)


@pytest.mark.parametrize("name", experiment.METHODS)
def test_what_cannot_run_over_a_network_says_so(flower, name):
    refused = {"local_only": "weights of its own", "scaffold": "weights of its own", "local_normalisation": "its own",
               "duplication": "in its own way", "synthetic_only": "in one place", "oracle_real": "real images",
               "centralised": "in one place"}
    assert (refused.get(name) or "") in flower.refusal(experiment.METHODS[name])
    assert bool(flower.refusal(experiment.METHODS[name])) == (name in refused)


# ---------------------------------------- hospitals that fail or lie


def test_hospitals_drop_out_as_in_one_process(flower, three, tmp_path):
    faults = Faults(drop=0.3, die=0.2)
    ours = rounds.run(three, QUICK, 0, rounds=5, faults=faults)
    theirs, _ = serve(flower, three, tmp_path, QUICK, 0, rounds=5, faults=faults)
    assert 0 < ours.took_part.sum() < ours.took_part.size
    assert np.array_equal(theirs.weights, ours.weights) and np.array_equal(theirs.took_part, ours.took_part)
    assert theirs.missed == ours.missed


def test_a_silent_hospital_is_not_waited_for_again(flower, three, tmp_path):
    def silent(k, kind, content):
        return None if k == 1 and kind == "train.update" else content

    flower.save_hospitals(three, tmp_path)
    grid = grid_of(flower, tmp_path, 3, silent)
    run = flower.serve(grid, Method(), 0, rounds=3, hospitals=3, patience=5)
    assert run.took_part.tolist() == [[True, False, True]] * 3
    assert (1, 1, "no answer within 5 seconds") in run.missed and len(run.missed) == 1
    assert grid.asked.count(("train.update", 1)) == 1 and ("evaluate.test", 1) not in grid.asked
    assert run.confusions.sum() == len(three.test) - len(three.test.labels[1::3])


@pytest.mark.parametrize("lie, said", [("nan", "not finite"), ("shape", "needed is torch.float32"),
                                       ("more images", "but reported 100"), ("nothing", "NoneType")])
def test_an_update_that_cannot_be_right_is_left_out(flower, three, tmp_path, lie, said):
    def change(k, kind, content):
        if k != 2 or kind != "train.update":
            return content
        tensors, facts = flower.opened(content)
        if lie == "nan":
            tensors["weights"][3] = float("nan")
        elif lie == "shape":
            tensors["weights"] = tensors["weights"][:-1]
        elif lie == "nothing":
            del tensors["weights"]
        return flower.letter(tensors, **facts | ({"images": 999} if lie == "more images" else {}))

    run, _ = serve(flower, three, tmp_path, Method(), 0, change, rounds=2)
    assert run.took_part.tolist() == [[True, True, False]] * 2
    assert [(r, k) for r, k, _ in run.missed] == [(1, 2), (2, 2)] and all(said in why for _, _, why in run.missed)


def test_bad_samples_are_left_out(flower, three, tmp_path):
    def change(k, kind, content):
        if kind != "train.offer" or k == 2:
            return content
        if k == 1:
            raise RuntimeError("the disk is full")
        tensors, facts = flower.opened(content)
        return flower.letter(tensors, **facts | {"pictures": [b"no picture"]})

    run, _ = serve(flower, three, tmp_path, replace(QUICK, pretrain_steps=0), 0, change, rounds=1)
    assert run.took_part.all()
    (r, k, first), (_, other, second) = run.missed
    assert (r, k, other) == (0, 0, 1) and "cannot be read" in first and second == "the disk is full"


def test_a_round_without_any_usable_update_is_an_error(flower, three, tmp_path):
    def change(k, kind, content):
        return flower.letter({}, seconds=0.0) if kind == "train.update" else content

    with pytest.raises(ValueError, match="no update of round 1 can be used"):
        serve(flower, three, tmp_path, Method(), 0, change, rounds=1)


@pytest.mark.parametrize("fact, value, said", [
    ("partition", 0, "says that it is hospital 0"), ("partition", 7, "0 to 2"),
    ("classes", ["a", "b"], "same list of names"), ("shape", [3, 64, 64], "one shape of images")])
def test_hospitals_that_do_not_fit_together_are_named(flower, three, tmp_path, fact, value, said):
    def change(k, kind, content):
        tensors, facts = flower.opened(content)
        return flower.letter(tensors, **facts | ({fact: value} if k == 2 else {}))

    with pytest.raises(ValueError, match=said):
        serve(flower, three, tmp_path, Method(), 0, change, rounds=1)


def test_missing_hospitals_are_named(flower, three, tmp_path):
    flower.save_hospitals(three, tmp_path)
    with pytest.raises(ValueError, match=r"only hospitals \[0, 1, 2\] of 0 to 3"):
        flower.serve(grid_of(flower, tmp_path, 3), Method(), 0, rounds=1, hospitals=4, patience=1)
    (tmp_path / "hospital_1" / "data.npz").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="a hospital cannot take part: .*data.npz"):
        flower.serve(grid_of(flower, tmp_path, 3), Method(), 0, rounds=1, hospitals=3, patience=5)


def test_a_supernode_must_say_what_it_holds(flower):
    from flwr.app import Context, Message, RecordDict

    message = Message(flower.letter(), dst_node_id=1, message_type="query.report")
    with pytest.raises(ValueError, match="--node-config"):
        flower.client_app(message, Context(1, 1, {"partition-id": 0}, RecordDict(), {"folder": "/elsewhere"}))


def test_secrets_are_for_their_owner_alone(flower, three, tmp_path):
    files = flower.prepare(three, tmp_path)
    assert {file.stat().st_mode & 0o777 for file in files if file.suffix == ".key"} == {0o600}
    for k in range(3):
        assert {file.name for file in (tmp_path / f"hospital_{k}").iterdir()} == {"data.npz", "own.key", "ca.crt"}
    assert "fedssg_helpers.flower:client_app" in (tmp_path / "researcher/app/pyproject.toml").read_text()


# ---------------------------------------- Flower's own engines


@pytest.mark.slow
def test_simulated_from_python(flower, three):
    same(flower.simulate(three, QUICK, 1, rounds=2), rounds.run(three, QUICK, 1, rounds=2))


def free_ports(number: int) -> int:
    """The first of `number` neighbouring ports of 127.0.0.1 that nobody uses."""
    while True:
        start = random.randrange(20_000, 60_000)
        try:
            for port in range(start, start + number):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
            return start
        except OSError:
            continue


@contextmanager
def processes(flower, folder: Path):
    """Starts shell lines in `folder`; whatever happens, none of them and no child of theirs outlives the block."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    settings = os.environ | flower.SETTINGS | {"PATH": path, "PYTHONPATH": str(course.ROOT), "FEDSSG_TEST": str(folder)}
    mark, started = f"FEDSSG_TEST={folder}".encode(), {}

    def offspring():  # Flower's and Ray's processes leave the group that they were started in; their mark they keep
        for place in Path("/proc").glob("[0-9]*"):
            try:
                if mark in (place / "environ").read_bytes().split(b"\0"):
                    yield int(place.name)
            except OSError:
                continue

    def start(name: str, line: str) -> subprocess.Popen:
        with (folder / f"{name}.log").open("wb") as log:
            started[name] = subprocess.Popen(["bash", "-c", line], cwd=folder, env=settings, stdout=log,
                                             stderr=subprocess.STDOUT, start_new_session=True)
        return started[name]

    try:
        yield start
    finally:
        for process in started.values():
            try:
                os.killpg(process.pid, signal.SIGTERM)
            except ProcessLookupError:
                continue
        end = time.monotonic() + 10
        while set(offspring()) - {os.getpid()} and time.monotonic() < end:
            time.sleep(0.2)
        for pid in set(offspring()) - {os.getpid()}:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        for process in started.values():
            process.wait(10)


def until(happened, seconds: float, folder: Path) -> None:
    """Wait; where it takes too long, the logs say why."""
    end = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > end:
            logs = "\n".join(f"--- {log.name}\n{log.read_text()[-3000:]}" for log in sorted(folder.glob("*.log")))
            pytest.fail(f"not within {seconds} seconds\n{logs}")
        time.sleep(0.2)


def listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.slow
def test_flwr_run_with_simulated_hospitals(flower, three, tmp_path):
    port = free_ports(1)
    flower.prepare(three, tmp_path, port)
    lines = flower.commands(3, True, port, method="fedavg", rounds=2, seed=1)
    with processes(flower, tmp_path) as start:
        start("server", lines["server"])
        until(lambda: listening(port), 30, tmp_path)
        run = start("run", lines["run"])
        until(lambda: run.poll() is not None, 200, tmp_path)
    same(experiment.restore(tmp_path / "run.npz"), rounds.run(three, Method(), 1, rounds=2))


@pytest.mark.slow
def test_a_deployment_in_which_a_hospital_dies(flower, three, tmp_path):
    """One server and three hospitals as processes, with TLS and registered keys; one is killed after a round."""
    port, method = free_ports(5), experiment.METHODS["fedssg_no_pretrain"]
    flower.prepare(three, tmp_path, port)
    lines = flower.commands(3, False, port, method="fedssg_no_pretrain", rounds=3, patience=40)
    with processes(flower, tmp_path) as start:
        start("server", lines.pop("server"))
        until(lambda: listening(port), 30, tmp_path)
        with pytest.raises(ssl.SSLCertVerificationError), socket.create_connection(("127.0.0.1", port)) as raw:
            ssl.create_default_context().wrap_socket(raw, server_hostname="127.0.0.1")
        trusting = ssl.create_default_context(cafile=tmp_path / "hospital_0" / "ca.crt")
        with socket.create_connection(("127.0.0.1", port)) as raw:
            trusting.wrap_socket(raw, server_hostname="127.0.0.1").close()

        started = {}
        for name in lines:
            started[name] = start(name, lines[name])
            if name.startswith("register"):
                assert started[name].wait(60) == 0, (tmp_path / f"{name}.log").read_text()
        (tmp_path / "hospital_2" / "stranger.key").write_bytes(flower.identity()[0])  # nobody has registered it
        line = lines["hospital 2"].replace(f"--port {port + 3}", f"--port {port + 4}")
        start("stranger", line.replace("own.key", "stranger.key"))
        said = tmp_path / "run.log"
        until(lambda: "round 1 of 3" in said.read_text() or started["run"].poll() is not None, 200, tmp_path)
        assert "round 1 of 3: 3 of 3 hospitals" in said.read_text(), said.read_text()
        os.killpg(started["hospital 2"].pid, signal.SIGKILL)
        until(lambda: started["run"].poll() is not None, 200, tmp_path)
        assert "SuperNode ID" in (tmp_path / "hospital 0.log").read_text()
        assert "SuperNode ID" not in (tmp_path / "stranger.log").read_text(), "a node with any key may join"

    run = experiment.restore(tmp_path / "run.npz")
    assert run.took_part[0].all() and run.took_part[:, :2].all() and not run.took_part[2, 2]
    assert {(k, why) for _, k, why in run.missed} == {(2, "no answer within 40 seconds")}
    shared = rounds.exchange(three.clients, three, method, 0)
    places, net = rounds.places_of(three.clients, three, method, 0, shared), rounds.SmallCNN(3, len(three.classes), 0)
    weights = net.weights.clone()
    for r, here in enumerate(run.took_part):
        weights = rounds.average([
            (rounds.local_update(net, places[k], weights, k, r, rounds=3, seed=0, method=method), 100)
            for k in np.flatnonzero(here)])
    assert np.array_equal(run.weights, weights.numpy())
    assert run.confusions.sum() == len(three.test) - len(three.test.labels[2::3])
