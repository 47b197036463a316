"""Flower: the same bits as in one process, and what happens when hospitals fail or lie."""

from __future__ import annotations

import ast
import random
import socket
import ssl
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import psutil
import pytest
import torch

from fedssg_helpers import runs, server
from fedssg_helpers.client import Absence, Faults
from fedssg_helpers.data import DataError
from fedssg_helpers.methods import METHODS, Clipped, Median, Method, Scaffold, Sharing
from fedssg_helpers.models import Backbone, resized
from fedssg_helpers.partition import Client
from fedssg_helpers.protection import Protection
from fedssg_helpers.sharing import Budget

ROOT = Path(__file__).resolve().parents[1]
APP = ROOT / "notebooks" / "flowerapp"
REAL = {"oracle_real", "centralised"}  # what they do is to move real images


def quick(method: Method) -> Method:
    """The same method with little pre-training."""
    steps = getattr(method.sharing, "pretrain_steps", 0)
    return replace(method, sharing=replace(method.sharing, pretrain_steps=20)) if steps else method


QUICK = quick(METHODS["fedssg"])


@pytest.fixture(scope="module")
def app():
    """The modules of the app, by name."""
    pytest.importorskip("flwr", reason="needs Flower: pip install -e '.[flower]'")
    from flowerapp.fedssg_app import client_app, deploy, server_app, task

    return SimpleNamespace(client_app=client_app, deploy=deploy, server_app=server_app, task=task)


@pytest.fixture(scope="module")
def three():
    """Three hospitals of 60 phantoms each, 90 test images."""
    federation, random = runs.federation("phantom", "", 3, 0.3, 0), np.random.default_rng(0)

    def some(client: Client, number: int) -> Client:
        return client.take(torch.from_numpy(random.permutation(len(client))[:number]))

    clients = [some(client, 60) for client in federation.clients]
    return replace(federation, clients=clients, test=some(federation.test, 90))


@dataclass
class FakeMessage:
    """As much of Flower's Message as the app uses; a real one can be made in a run only."""

    content: object = None
    dst_node_id: int = 0
    message_type: str = ""
    reply_to: object = None
    error: object = None

    @property
    def metadata(self):
        asked = self.reply_to or self
        node = {"src_node_id": asked.dst_node_id, "dst_node_id": asked.dst_node_id}
        return SimpleNamespace(message_type=asked.message_type, **node)

    def has_error(self) -> bool:
        return self.error is not None


@pytest.fixture
def serve(app, three, tmp_path, monkeypatch):
    """serve(method, seed, change, **settings) -> (Run, what was asked): all but Flower's processes and messages.

    Nodes have random numbers and appear one by one, replies come in random order. ``change(k, question, answer)`` may
    replace a hospital's answer, raise (an error of Flower's) or give None (silence).
    """
    from flwr.app import Context, RecordDict

    for module in (app.client_app, app.server_app):
        monkeypatch.setattr(module, "Message", FakeMessage)
    clock = SimpleNamespace(monotonic=time.monotonic, time=time.time, sleep=lambda seconds: None)
    monkeypatch.setattr(app.server_app, "time", clock)  # nodes that appear one by one need no waiting

    def unchanged(k, question, answer):
        return answer

    def run(method, seed=0, change=unchanged, *, hospitals=3, federation=three, **settings):
        app.task.save_hospitals(federation, tmp_path, seed)
        nodes, calls = {random.getrandbits(60): k for k in range(3)}, []
        contexts = {}
        for node, k in nodes.items():
            known = {"partition-id": k, "num-partitions": 3}
            contexts[node] = Context(1, node, known, RecordDict(), {"folder": str(tmp_path)})

        def reply(message):
            node, question = message.dst_node_id, message.message_type.split(".")[1]
            calls.append((question, nodes[node]))
            answer = app.task.decode(app.client_app.app(message, contexts[node]).content)
            try:
                answer = change(nodes[node], question, answer)
            except Exception as error:
                return FakeMessage(error=SimpleNamespace(reason=f"Traceback ...\n{error}"), reply_to=message)
            return answer and FakeMessage(app.task.encode(answer), reply_to=message)

        class Grid:
            def get_node_ids(self):
                calls.append("nodes")
                return list(nodes)[: calls.count("nodes") - 1]

            def send_and_receive(self, messages, *, timeout=None):
                replies = list(filter(None, map(reply, messages)))
                return random.sample(replies, len(replies))

        return app.server_app.serve(Grid(), hospitals, method, seed, **{"rounds": 2} | settings), calls

    return run


def same(one, other) -> None:
    """Two runs agree in all but seconds."""
    assert np.array_equal(one.weights, other.weights) and np.array_equal(one.confusions, other.confusions)
    assert np.array_equal(one.rounds, other.rounds) and np.array_equal(one.took_part, other.took_part)
    assert one.missed == other.missed
    for name in one.costs:
        assert one.costs[name] == other.costs[name] or "seconds" in name, name


# --- the same bits ---


@pytest.mark.parametrize("name", sorted(set(METHODS) - REAL))
def test_the_same_bits_as_in_one_process(serve, three, name):
    method = quick(METHODS[name])
    theirs, _ = serve(method, 1)
    same(theirs, server.run(three, method, 1, rounds=2))
    assert theirs.confusions[-1].sum() == len(three.test)


GUARDED = Sharing(protection=Protection(0.05, 2.0), budget=Budget(silent=(1,)))
MIXED = (
    Method(gradient=Scaffold(), server=Median(), stays="norm"),
    replace(QUICK, server=Clipped(), sharing=GUARDED),
)


@pytest.mark.parametrize("method", MIXED)
def test_parts_travel_together(serve, three, method):
    same(serve(method, epochs=2)[0], server.run(three, method, 0, rounds=2, epochs=2))


@pytest.mark.slow
def test_a_torchvision_network_at_64_pixels(serve, three):
    def larger(own):
        return replace(own, images=resized(own.images, 64).contiguous()).take(slice(0, 40))

    hospitals = replace(three, clients=[*map(larger, three.clients)], test=larger(three.test))
    method = replace(quick(METHODS["fedssg"]), network=Backbone("resnet18"))
    theirs, _ = serve(method, rounds=2, federation=hospitals)
    assert theirs.costs["bytes_samples_up"] > 0
    same(theirs, server.run(hospitals, method, 0, rounds=2))


def test_hospitals_drop_out_as_in_one_process(serve, three):
    faults = Faults(absent=0.3, die=0.2, late=0.1)
    ours = server.run(three, QUICK, 0, rounds=5, faults=faults)
    assert 0 < ours.took_part.sum() < ours.took_part.size
    same(serve(QUICK, rounds=5, faults=faults)[0], ours)


def test_a_second_run_at_the_same_node_starts_afresh(serve, three):
    ours = server.run(three, METHODS["fedavg"], 0, rounds=2)
    serve(QUICK)
    same(serve(METHODS["fedavg"])[0], ours)


# --- what travels, and what cannot ---


def test_what_a_message_holds_comes_out_again(app):
    tensors = dict(
        weights=torch.randn(5), images=torch.zeros(0, 3, 4, 4, dtype=torch.uint8), flag=torch.tensor([True])
    )
    facts = dict(
        round=3, seconds=0.25, styles=False, why="text", pictures=[b"ab", b""], shape=[3, 4], none=[]
    )
    parts = dict(
        sharing=GUARDED, method=METHODS["fedssg+combined"], faults=Faults(0.25, late=0.5), classes=["a", "b"]
    )
    found = app.task.decode(app.task.encode(tensors | facts | parts))
    assert {name: found[name] for name in facts | parts} == facts | parts and type(found["styles"]) is bool
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype


def test_methods_that_move_real_images_are_refused(app):
    assert {name for name in METHODS if app.server_app.refusal(METHODS[name])} == REAL
    for name in REAL:
        with pytest.raises(ValueError, match="moves real images out of hospitals"):
            app.deploy.simulate(None, METHODS[name], 0, rounds=1)


def test_a_part_that_hospitals_do_not_have_is_refused(app):
    def mine(updates, weights, memory):
        return Median()(updates, weights, memory)

    with pytest.raises(
        ValueError, match="is 'mine'; it must be installed at every hospital: add it to fedssg_hel"
    ):
        app.deploy.simulate(None, Method(server=mine), 0, rounds=1)


# --- hospitals that fail or lie ---


def test_a_silent_hospital_is_not_waited_for_again(serve, three):
    def silent(k, question, answer):
        return None if k == 1 and question == "update" else answer

    run, calls = serve(Method(), change=silent, rounds=3, patience=5)
    assert run.took_part.tolist() == [[True, False, True]] * 3
    assert run.missed == [(1, 1, "no answer within 5 seconds")]
    assert calls.count(("update", 1)) == calls.count(("test", 1)) == 1  # it had tested the first weights
    here = server.home_of_tests(three, 0) != 1
    assert run.confusions[0].sum() == len(three.test) and run.confusions[-1].sum() == here.sum()


def test_when_everybody_is_silent_the_run_ends(serve):
    def silent(k, question, answer):
        return None if question == "update" else answer

    with pytest.raises(ValueError, match="no update of round 1 can be used.*no answer within 5 seconds"):
        serve(Method(), change=silent, patience=5)


@pytest.mark.parametrize(
    "lie, said",
    [
        (lambda answer: answer["weights"].fill_(torch.nan), "not finite"),
        (lambda answer: answer.update(weights=answer["weights"][:-1]), "needed is torch.float32"),
        (lambda answer: answer.update(images=999), "but reported 60"),
        (lambda answer: answer.pop("weights"), "NoneType"),
        (lambda answer: 1 / 0, "division by zero"),
    ],
)
def test_an_update_that_cannot_be_right_is_left_out(serve, lie, said):
    def change(k, question, answer):
        if (k, question) == (2, "update"):
            lie(answer)
        return answer

    run, _ = serve(Method(), change=change)
    assert run.took_part.tolist() == [[True, True, False]] * 2
    assert [(r, k, said in why) for r, k, why in run.missed] == [(1, 2, True), (2, 2, True)]


def test_a_message_that_cannot_be_read_is_left_out(app):
    from flwr.app import RecordDict

    answer, why = app.server_app.opened(FakeMessage(RecordDict()))
    assert answer is None and "sent a message that cannot be read (KeyError" in why


def test_bad_samples_are_left_out(serve):
    def change(k, question, answer):
        if question == "generate" and k < 2:
            answer |= {"pictures": [b"no picture"]} if k == 0 else {"why": "the disk is full"}
        return answer

    run, _ = serve(replace(QUICK, sharing=Sharing()), change=change)
    assert run.took_part.all()
    (r, k, first), (_, other, second) = run.missed
    assert (r, k, other) == (0, 0, 1) and "cannot be read" in first and second == "the disk is full"


@pytest.mark.parametrize(
    "name, value, said",
    [
        ("hospital", 0, "says that it is hospital 0"),
        ("hospital", 7, "0 to 2"),
        ("classes", ["a", "b"], "classes of hospital 2"),
        ("shape", [3, 64, 64], "shape of hospital 2"),
    ],
)
def test_hospitals_that_do_not_fit_together_are_named(serve, name, value, said):
    with pytest.raises(ValueError, match=said):
        serve(Method(), change=lambda k, question, answer: answer | ({name: value} if k == 2 else {}))


def test_missing_hospitals_are_named(serve):
    with pytest.raises(ValueError, match=r"only hospitals \[0, 1, 2\] of 0 to 3 were there within 1 seconds"):
        serve(Method(), hospitals=4, patience=1)


# --- files and folders ---


def test_a_hospitals_file_is_all_of_its_own_and_nothing_else(app, three, tmp_path):
    files = app.task.save_hospitals(three, tmp_path, 5)
    found = [app.task.load_hospital(file, k) for k, file in enumerate(files)]
    home = server.home_of_tests(three, 5)
    for k, mine in enumerate(found):
        for part in app.task.PARTS:
            assert torch.equal(getattr(mine.data, part), getattr(three.clients[k], part))
            assert torch.equal(getattr(mine.test, part), getattr(three.test, part)[home == k])
        assert torch.equal(mine.data.group, three.clients[k].group) and mine.test.group is None
        assert (mine.k, mine.classes, mine.devices) == (k, three.classes, three.devices)
    assert sum(len(mine.test) for mine in found) == len(three.test)


BAD = {
    "flat images": {"images": np.zeros((3, 4), np.uint8)},
    "too few labels": {"labels": np.zeros(2, np.int64)},
    "no such class": {"labels": np.full(60, 99)},
    "float images": {"test_images": np.zeros((5, 3, 28, 28), np.float32)},
    "too few groups": {"group": np.zeros(2, np.int64)},
    "no names": {"classes": None},
    "a pickle": {"devices": np.array([{}], object)},
}


@pytest.mark.parametrize("change", BAD)
def test_a_bad_file_is_named(app, three, tmp_path, change):
    file = app.task.save_hospitals(three, tmp_path, 0)[0]
    with np.load(file, allow_pickle=False) as arrays:
        changed = dict(arrays) | BAD[change]
    np.savez(file, **{name: value for name, value in changed.items() if value is not None})
    with pytest.raises(DataError, match=r"hospital_0/data\.npz"):
        app.task.load_hospital(file, 0)


def test_a_supernode_must_say_what_it_holds(app, three, tmp_path, monkeypatch):
    from flwr.app import Context, RecordDict

    def why(**node) -> str:  # what a node with this config answers to the server's first question
        message = FakeMessage(app.task.encode({"styles": False}), 1, "query.report")
        known = {name.replace("_", "-"): value for name, value in node.items()}
        answer = app.client_app.app(message, Context(1, 1, known, RecordDict(), {"folder": "/elsewhere"}))
        return app.task.decode(answer.content).get("why", "")

    monkeypatch.setattr(app.client_app, "Message", FakeMessage)
    file = app.task.save_hospitals(three, tmp_path, 0)[1]
    assert "--node-config" in why(partition_id=0) and "--node-config" in why(data=str(file))
    assert "there is no such file" in why(partition_id=0, data="none.npz")
    assert not why(partition_id=1, data=str(file))
    file.write_bytes(b"damaged")  # seen at once, though the file was read before
    assert "hospital_1/data.npz" in why(partition_id=1, data=str(file))


def test_another_machine_reaches_the_server(app, three, tmp_path, start):
    """127.0.0.2 plays it: the server listens there too, and its certificate is for this address."""
    port, address = app.deploy.free_port(), "127.0.0.2"
    app.deploy.prepare(three, tmp_path, 0, port, address)
    lines = app.deploy.commands(3, False, port, address)
    assert f"--superlink {address}:{port} " in lines["hospital 0"]
    app.deploy.until_listening(port, start("server", lines["server"]))
    trusting = ssl.create_default_context(cafile=tmp_path / "hospital_0" / "ca.crt")
    try:
        raw = socket.create_connection((address, port))
    except OSError:
        pytest.skip("this system has one loopback address only")
    trusting.wrap_socket(raw, server_hostname=address).close()


def test_secrets_are_for_their_owner_alone(app, three, tmp_path):
    files = app.deploy.prepare(three, tmp_path)
    assert {file.stat().st_mode & 0o777 for file in files if file.suffix == ".key"} == {0o600}
    for k in range(3):
        held = {file.name for file in (tmp_path / f"hospital_{k}").iterdir()}
        assert held == {"data.npz", "own.key", "ca.crt"}


def test_flower_builds_the_app(app, tmp_path):
    with app.deploy.program(["flwr", "build", "--app", str(APP)], tmp_path) as build:
        assert build.wait(60) == 0
    (bundle,) = tmp_path.glob("course.fedssg.*.fab")
    assert bundle.stat().st_size < 20_000


def test_only_what_flower_promises_to_keep_is_imported():
    public = {"flwr.app", "flwr.clientapp", "flwr.serverapp", "flwr.serverapp.strategy"}
    texts = {
        path: path.read_text()
        for path in [*ROOT.glob("fedssg_helpers/*.py"), *ROOT.glob("tests/*.py"), *APP.rglob("*.py")]
    }
    for path in ROOT.glob("notebooks/*.ipynb"):
        cells = nbformat.read(path, as_version=4).cells
        texts[path] = "\n".join(
            cell.source for cell in cells if cell.cell_type == "code" and "flwr" in cell.source
        )
    found = set()
    for text in texts.values():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(node.module or "")
    assert public >= {name for name in found if name.split(".")[0] == "flwr"} >= {"flwr.app"}


def test_without_flower_the_error_names_the_cure_and_the_rest_works():
    code = "import sys; sys.modules['flwr'] = None\nfrom fedssg_helpers import runs, explore\n"
    code += (
        "try:\n    from flowerapp.fedssg_app import deploy\nexcept ImportError as error:\n    print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=APP.parent, capture_output=True, text=True, timeout=120
    )
    assert "pip install -e '.[flower]'" in done.stdout, done.stderr


# --- Flower's own processes ---


def test_a_program_ends_with_all_that_it_has_started(app, tmp_path):
    with app.deploy.program(["bash", "-c", "sleep 100 & sleep 100"], tmp_path) as started:
        until(lambda: len(started.children()) == 2, 10, tmp_path)
        family = [started, *started.children()]
    assert not any(map(psutil.Process.is_running, family))


def until(happened, seconds: float, folder: Path) -> None:
    """Wait; where it takes too long, the logs say why."""
    end = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > end:
            logs = "\n".join(
                f"--- {log.name}\n{log.read_text()[-3000:]}" for log in sorted(folder.glob("*.log"))
            )
            pytest.fail(f"not within {seconds} seconds\n{logs}")
        time.sleep(0.2)


@pytest.fixture
def start(app, tmp_path):
    """start(name, shell line) -> process: the lines that participants type; all of them have ended after the test."""
    with ExitStack() as stack:

        def start(name: str, line: str) -> psutil.Popen:
            log = stack.enter_context((tmp_path / f"{name}.log").open("wb"))
            return stack.enter_context(app.deploy.program(["bash", "-c", line], tmp_path, log))

        yield start


@pytest.mark.slow
def test_the_lines_of_a_simulation(app, three, tmp_path, start):
    port = app.deploy.free_port()
    app.deploy.prepare(three, tmp_path, 1, port)
    lines = app.deploy.commands(3, True, port, method="scaffold", rounds=2, seed=1)
    app.deploy.until_listening(port, start("server", lines["server"]))
    for _ in range(app.deploy.TRIES):
        assert start("run", lines["run"]).wait(200) == 0
        if app.deploy.SLOW not in (tmp_path / "run.log").read_text():
            break
    same(runs.restore(tmp_path / "run.npz"), server.run(three, METHODS["scaffold"], 1, rounds=2))


def neighbouring_ports(app, number: int) -> int:
    """The first of so many free ports."""
    while True:
        try:
            for port in range(first := app.deploy.free_port(), first + number):
                socket.create_server(("127.0.0.1", port)).close()
            return first
        except OSError:
            continue


@pytest.mark.slow
def test_a_deployment_in_which_a_hospital_dies(app, three, tmp_path, start):
    """One server and three hospitals as processes, with TLS and registered keys; one is killed after a round."""
    port, method = neighbouring_ports(app, 5), METHODS["fedssg_no_pretrain"]
    app.deploy.prepare(three, tmp_path, 0, port)
    lines = app.deploy.commands(3, False, port, method="fedssg_no_pretrain", rounds=2, patience=45)
    app.deploy.until_listening(port, start("server", lines.pop("server")))
    with pytest.raises(ssl.SSLCertVerificationError), socket.create_connection(("127.0.0.1", port)) as raw:
        ssl.create_default_context().wrap_socket(raw, server_hostname="127.0.0.1")
    trusting = ssl.create_default_context(cafile=tmp_path / "hospital_0" / "ca.crt")
    with socket.create_connection(("127.0.0.1", port)) as raw:
        trusting.wrap_socket(raw, server_hostname="127.0.0.1").close()

    last, nodes = (
        lines.pop("run"),
        {name: line for name, line in lines.items() if name.startswith("hospital")},
    )
    registering = {name: start(name, lines[name]) for name in lines.keys() - nodes.keys()}
    for name, process in registering.items():
        assert process.wait(100) == 0, (tmp_path / f"{name}.log").read_text()
    (tmp_path / "hospital_2" / "stranger.key").write_bytes(
        app.deploy.identity()[0]
    )  # nobody has registered it
    line = nodes["hospital 2"].replace(f"--port {port + 3}", f"--port {port + 4}")
    started = {name: start(name, line) for name, line in nodes.items()}
    start("stranger", line.replace("own.key", "stranger.key"))
    for name in nodes:
        until(lambda: "SuperNode ID" in (tmp_path / f"{name}.log").read_text(), 100, tmp_path)  # noqa: B023
    started["run"] = start("run", last)
    said = tmp_path / "run.log"
    until(lambda: "round 1 of 2" in said.read_text() or started["run"].poll() is not None, 600, tmp_path)
    assert "round 1 of 2: 3 of 3 hospitals" in said.read_text(), said.read_text()
    for process in [*started["hospital 2"].children(recursive=True), started["hospital 2"]]:
        process.kill()
    answered = {"update": 0, "test": 0}

    def dies(question, k, content, answer):
        if k == 2 and question in answered:
            answered[question] += 1
            if answered[question] > {"update": 1, "test": 2}[question]:
                raise Absence("killed")
        return answer

    ours = server.run(three, method, 0, rounds=2, tamper=dies)  # while the others wait for the dead one
    until(lambda: started["run"].poll() is not None, 600, tmp_path)
    assert "SuperNode ID" not in (tmp_path / "stranger.log").read_text(), "a node with any key may join"

    run = runs.restore(tmp_path / "run.npz")
    assert run.took_part.tolist() == [[True, True, True], [True, True, False]]
    assert run.missed == [(2, 2, "no answer within 45 seconds")]
    assert np.array_equal(run.weights, ours.weights)
    here = int((server.home_of_tests(three, 0) != 2).sum())
    assert [int(c.sum()) for c in run.confusions] == [90, 90, here]
