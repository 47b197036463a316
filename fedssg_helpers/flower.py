"""The same hospitals and the same server on Flower (flower.ai): simulated, or each on a machine of its own.

Nothing is implemented twice: this module only carries the arguments and results of the course's functions in
Flower's messages. The server asks in phases, and each hospital answers with one function of `ANSWERS`:

- `report`: who is there, how many images of each class and device, and how these look
- `offer`: train the generator and draw the samples that the plan asks for
- `receive`: keep what was dealt
- `update`: one round of local training, weights in, weights out
- `test`: confusion matrices of the final weights on the hospital's part of the test images

Flower numbers its nodes at random, and replies arrive in any order. So each hospital brings a partition id, every
random act is keyed by (seed, partition id, round), and replies are sorted by it: the numbers are those of
`rounds.run`. Nothing here is needed by any other module.
"""
from __future__ import annotations

import json
import logging
import os
import shlex
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

# Before Flower is imported: it and Ray report their use to nobody, look for no newer version, and Ray's processes get
# the processor like any other (by default they stand back, and starve on a busy machine).
SETTINGS = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_USAGE_STATS_ENABLED": "0",
         "RAY_DEDUP_LOGS": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_worker_niceness": "0"}
for name, value in SETTINGS.items():
    os.environ.setdefault(name, value)

try:
    from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
except ImportError as error:
    raise ImportError("Flower is not installed; it is an extra, and only lesson 07 uses it. In the project's folder: "
                      "pip install -e '.[flower]'") from error

from . import checks, sharing
from . import rounds as engine
from .data import DataError, _need, _read
from .models import SmallCNN
from .partition import Client, Federation
from .rounds import Faults, Method, Run

PARTS = ("images", "labels", "device")  # of a Client


# ---------------------------------------- what a hospital holds


def save_hospitals(federation: Federation, folder) -> list[Path]:
    """Write ``hospital_<k>/data.npz`` for each hospital: its images, and every K-th test image as its part.

    Plain arrays, no pickle: images uint8 (N, C, H, W), labels and device int64 (N,), the same with ``test_`` in
    front, and the names of classes and devices.
    """
    test, number = federation.test, len(federation.clients)
    files = [Path(folder) / f"hospital_{k}" / "data.npz" for k in range(number)]
    for k, (file, client) in enumerate(zip(files, federation.clients)):
        file.parent.mkdir(exist_ok=True)
        np.savez(file, classes=np.array(federation.classes), devices=np.array(federation.devices),
                 **{part: getattr(client, part).numpy() for part in PARTS},
                 **{f"test_{part}": getattr(test, part)[k::number].numpy() for part in PARTS})
    return files


def load_hospital(file) -> Federation:
    """One hospital's file, as a federation of one: its only client, and its own part of the test images.

    Raises
    ------
    DataError
        No such file, or not what `save_hospitals` writes.
    """
    file = Path(file)
    arrays = _read(file, "Write it with flower.save_hospitals, and give its path to the SuperNode: data=\"...\".")
    _need(arrays, [*PARTS, *(f"test_{part}" for part in PARTS), "classes", "devices"], file)
    own, test = (Client(*(torch.from_numpy(arrays[front + part]) for part in PARTS)) for front in ("", "test_"))
    for client in (own, test):
        if client.images.dtype != torch.uint8 or client.images.ndim != 4 or not (
                client.images.shape[:1] == client.labels.shape == client.device.shape):
            raise DataError(f"{file}: images must be uint8 (N, C, H, W), with one label and one device for each. "
                            "Write it with flower.save_hospitals.")
    classes, devices = (tuple(map(str, arrays[names])) for names in ("classes", "devices"))
    return Federation([own], test, classes, devices, file.parent.name)


# ---------------------------------------- letters: what travels


def letter(tensors: dict | None = None, **facts) -> RecordDict:
    """A message's content: tensors by name, and facts (numbers, text, bytes, or lists of them)."""
    return RecordDict({"tensors": ArrayRecord(dict(tensors or {})), "facts": ConfigRecord(facts)})


def opened(content: RecordDict) -> tuple[dict[str, torch.Tensor], dict]:
    """What `letter` was given."""
    return content["tensors"].to_torch_state_dict(), dict(content["facts"])


# ---------------------------------------- a hospital's answers


def report(hospital: Federation, k: int, content: RecordDict, state: RecordDict) -> RecordDict:
    """Who is there, and has how much of what: counts (C, D) and style (D, 2, C), but no image."""
    client, shape = hospital.clients[0], (len(hospital.classes), len(hospital.devices))
    have, style = sharing.reports([client], *shape)[0], sharing.styles([client], shape[1])
    return letter({"have": torch.from_numpy(have), "style": style}, partition=k, tests=len(hospital.test),
                  classes=list(hospital.classes), devices=list(hospital.devices), shape=list(client.images.shape[1:]))


def offer(hospital: Federation, k: int, content: RecordDict, state: RecordDict) -> RecordDict:
    """Train the generator, and send as many samples of each cell as the server asks for."""
    (tensors, facts), began = opened(content), time.perf_counter()
    options = {name: facts[name] for name in ("temperature", "reject", "grain", "odd")}
    images, labels, device = sharing.offer_of(hospital.clients[0], tensors["numbers"].numpy(), k, facts["seed"],
                                              **options)
    return letter({"labels": labels, "device": device}, pictures=sharing.packed(images),
                  seconds=time.perf_counter() - began)


def receive(hospital: Federation, k: int, content: RecordDict, state: RecordDict) -> RecordDict:
    """Keep the samples that were dealt, in what Flower calls the context's state: it stays at this node."""
    state["tensors"], state["facts"] = content["tensors"], content["facts"]
    return letter()


def update(hospital: Federation, k: int, content: RecordDict, state: RecordDict) -> RecordDict:
    """One round of local training, from the server's weights."""
    (tensors, facts), began = opened(content), time.perf_counter()
    if why := Faults(*facts["faults"]).of(facts["seed"], k, facts["round"]):
        raise RuntimeError(why)
    method = Method(**json.loads(facts["method"]))
    place = engine.places_of(hospital.clients, hospital, method, facts["seed"], _received(hospital, state))[0]
    weights = engine.local_update(_net(hospital), place, tensors["weights"], k, facts["round"], seed=facts["seed"],
                                  rounds=facts["rounds"], method=method, styles=tensors.get("styles"))
    return letter({"weights": weights}, images=place.own, seconds=time.perf_counter() - began)


def test(hospital: Federation, k: int, content: RecordDict, state: RecordDict) -> RecordDict:
    """Confusion matrices (D, C, C) of the server's weights on the hospital's own part of the test images."""
    tensors, _ = opened(content)
    seen = engine.evaluate(_net(hospital), tensors["weights"], hospital, tensors.get("styles"))
    return letter({"confusions": torch.from_numpy(seen)})


def _net(hospital: Federation) -> SmallCNN:
    return SmallCNN(hospital.test.images.shape[1], len(hospital.classes))


def _received(hospital: Federation, state: RecordDict) -> sharing.Shared | None:
    """What `receive` kept, as `rounds.places_of` wants it; None where nothing was dealt."""
    if "facts" not in state:
        return None
    tensors, facts = opened(state)
    images = sharing.unpacked(facts["pictures"], *hospital.test.images.shape[1:3])
    pool = sharing.Pool(images, tensors["labels"], tensors["device"], torch.zeros(len(images), dtype=torch.int64))
    return sharing.Shared(None, pool, [torch.arange(len(pool))], {})


def app_of_hospitals(folder: str = "") -> ClientApp:
    """The ClientApp. Each SuperNode names its own file (``data`` in its node config); hospitals that are simulated
    find theirs in `folder`, or in the run config's ``folder``."""
    app = ClientApp()

    def answering(work):
        def answer(message: Message, context: Context) -> Message:
            k, file = context.node_config["partition-id"], context.node_config.get("data")
            if file is None and "num-partitions" not in context.node_config:
                raise ValueError("this SuperNode does not say which data it holds; start it with --node-config "
                                 "'partition-id=0 data=\"data.npz\"'")
            file = file or Path(folder or context.run_config["folder"]) / f"hospital_{k}" / "data.npz"
            return Message(work(load_hospital(file), k, message.content, context.state), reply_to=message)
        return answer

    app.query("report")(answering(report))
    for work in (offer, receive, update):
        app.train(work.__name__)(answering(work))
    app.evaluate("test")(answering(test))
    return app


# ---------------------------------------- the server


@dataclass(frozen=True)
class Line:
    """The server's line to its hospitals: Flower's grid, each hospital's node id, and how long to wait for an answer.

    A hospital that was silent for `patience` seconds is taken out of ``nodes``: it is not waited for again.
    """

    grid: Grid
    nodes: dict[int, int]
    patience: float

    def ask(self, kind: str, letters: dict[int, RecordDict]) -> tuple[dict[int, tuple[dict, dict]], dict[int, str]]:
        """Send hospitals their letters, wait, and open the answers.

        Returns
        -------
        answers : dict
            What `opened` gives, by partition id and in its order.
        absent : dict of int to str
            Who did not answer, and why.
        """
        home = {self.nodes[k]: k for k in letters}
        messages = [Message(content, dst_node_id=self.nodes[k], message_type=kind) for k, content in letters.items()]
        answers, absent = {}, {}
        for reply in self.grid.send_and_receive(messages, timeout=self.patience):
            k = home.pop(reply.metadata.src_node_id)
            if reply.has_error():
                absent[k] = _said(reply.error.reason)
            else:
                answers[k] = opened(reply.content)
        for k in home.values():
            absent[k] = f"no answer within {self.patience:.0f} seconds"
            del self.nodes[k]
        return dict(sorted(answers.items())), dict(sorted(absent.items()))


def _said(reason: str) -> str:
    """The hospital's own words, out of what Flower's engines wrap around them."""
    return reason.strip().splitlines()[-1].split("Message: ")[-1].split(":<")[-1].strip("<>'\" ")


def gathered(grid: Grid, hospitals: int, patience: float) -> tuple[Line, dict[int, tuple[dict, dict]]]:
    """The line to the hospitals, and the `report` of each by partition id, once all are there.

    Raises
    ------
    ValueError
        Hospitals that are missing after `patience` seconds, that cannot report, or that do not fit together.
    """
    nodes, reports, seen, end = {}, {}, set(), time.monotonic() + patience
    while len(nodes) < hospitals:
        new = {node: node for node in grid.get_node_ids() if node not in seen}
        seen |= set(new)
        answers, absent = Line(grid, new, patience).ask("query.report", {node: letter() for node in new})
        if absent:
            raise ValueError(f"a hospital cannot take part: {next(iter(absent.values()))}")
        for node, (tensors, facts) in answers.items():
            k = facts["partition"]
            if k in nodes or not 0 <= k < hospitals:
                raise ValueError(f"a node says that it is hospital {k}; needed is one node for each of 0 to "
                                 f"{hospitals - 1}: set partition-id in its node config")
            nodes[k], reports[k] = node, (tensors, facts)
        if time.monotonic() > end:
            raise ValueError(f"only hospitals {sorted(nodes)} of 0 to {hospitals - 1} were there within "
                             f"{patience:.0f} seconds; start the others, or ask for fewer")
        time.sleep(0.2)
    for k, (_, facts) in reports.items():
        for what in ("classes", "devices", "shape"):
            if facts[what] != reports[0][1][what]:
                raise ValueError(f"hospital {k} has {what} {facts[what]}, hospital 0 has {reports[0][1][what]}; all "
                                 "hospitals must use the same list of names and one shape of images")
    return Line(grid, nodes, patience), dict(sorted(reports.items()))


def joint_styles(have: np.ndarray, styles: torch.Tensor) -> torch.Tensor:
    """`sharing.styles` (D, 2, C) of all hospitals, from their own (K, D, 2, C) and their counts `have` (K, C, D).

    Mean of means, and mean square plus spread of the means; equal up to rounding, as sums are taken in parts.
    """
    number = torch.from_numpy(have.sum(1)).double()  # (K, D)
    number = torch.where(number.sum(0) > 0, number, number.sum(1, keepdim=True))  # a device of nobody: all images
    part = (number / number.sum(0))[:, :, None]
    mean, deviation = styles.double().unbind(2)
    joint = (part * mean).sum(0)
    spread = (part * (deviation.square() + (mean - joint).square())).sum(0).sqrt()
    return torch.stack([joint, spread.clamp(min=0.01)], 1).float()


def collected(line: Line, method: Method, seed: int, have: np.ndarray, shape: tuple[int, int, int],
              run: Run) -> tuple[sharing.Plan, sharing.Pool]:
    """What `sharing.share` does up to the pool: plan from the reports (K, C, D), uploads asked for and checked."""
    agreed = sharing.plan(have, method.sharing, method.budget)
    answers, absent = line.ask("train.offer", {
        k: letter({"numbers": torch.from_numpy(agreed.offer[k])}, seed=seed, temperature=float(method.temperature),
                  reject=float(method.reject), grain=float(method.grain), odd=float(method.odd)) for k in line.nodes})
    offers = [(torch.empty(0, *shape, dtype=torch.uint8), *torch.empty(2, 0, dtype=torch.int64))] * len(have)
    for k, (tensors, facts) in answers.items():
        run.costs["generator_seconds"] += facts["seconds"]
        run.costs["bytes_samples_up"] += sum(map(len, facts["pictures"]))
        try:
            offers[k] = sharing.unpacked(facts["pictures"], *shape[:2]), tensors["labels"], tensors["device"]
        except (OSError, ValueError, RuntimeError) as error:
            absent[k] = f"sent pictures that cannot be read ({error})"
    offers, refused = sharing.accepted(offers, agreed.offer, shape)
    run.missed += [(0, k, why) for k, why in sorted((refused | absent).items())]
    return agreed, sharing.pool_of(offers)


def dealt(line: Line, agreed: sharing.Plan, pool: sharing.Pool, seed: int, keep: torch.Tensor | None,
          run: Run) -> None:
    """Send each hospital the pool rows that `sharing.deal` gives it (of them, those in `keep`)."""
    letters = {}
    for k in line.nodes:
        rows = sharing.deal(agreed.want[k], pool, k, seed)
        rows = rows if keep is None else rows[keep[rows]]
        pictures = sharing.packed(pool.images[rows])
        letters[k] = letter({"labels": pool.labels[rows], "device": pool.device[rows]}, pictures=pictures)
        run.costs["bytes_samples_down"] += sum(map(len, pictures))
    _, absent = line.ask("train.receive", letters)
    run.missed += [(0, k, f"received nothing: {why}") for k, why in absent.items()]


def serve(grid: Grid, method: Method, seed: int, *, rounds: int, hospitals: int, patience: float = 600.0,
          faults: Faults = Faults(), tell=lambda line: None) -> Run:
    """The server's whole part, as `rounds.run` plays it in one process.

    Parameters
    ----------
    hospitals : int
        How many to wait for; their partition ids are 0, 1, ...
    patience : float
        Seconds that an answer may take. Who is silent for so long is left out from then on; who answers with an error
        is left out of that round.
    faults : Faults
        As in `rounds.run`; here the hospitals themselves refuse.
    tell : callable (str)
        Gets a line after every phase.

    Returns
    -------
    Run
        Tested after the last round only.

    Raises
    ------
    ValueError
        A method that cannot run here, see `refusal`; what `gathered` raises; or a round without any usable update.
    """
    if why := refusal(method):
        raise ValueError(why)
    line, reports = gathered(grid, hospitals, patience)
    tell(f"{hospitals} hospitals have reported")
    have = torch.stack([tensors["have"] for tensors, _ in reports.values()]).numpy()
    shape, images = tuple(reports[0][1]["shape"]), have.sum((1, 2)).tolist()
    styles = joint_styles(have, torch.stack([tensors["style"] for tensors, _ in reports.values()]))
    styles = styles if method.device_statistics else None
    net = SmallCNN(shape[0], have.shape[1], seed)
    weights = net.weights.clone()
    costs = dict.fromkeys(("train_seconds", "generator_seconds", "server_seconds", "bytes_up", "bytes_down",
                           "bytes_samples_up", "bytes_samples_down"), 0.0)
    run = Run(weights.numpy(), np.array([rounds]), None, costs, np.zeros((rounds, hospitals), bool))

    if method.sharing:
        (agreed, pool), keep = collected(line, method, seed, have, shape, run), None
        tell(f"{len(pool)} samples were generated")
        began = time.perf_counter()
        if method.pretrain_steps and len(pool):
            weights = engine.pretrain(net, pool, method.pretrain_steps, seed, styles=styles)
        if method.drop and len(pool):
            keep = engine.convincing(net, weights, pool, method.drop, styles)
        costs["server_seconds"] = time.perf_counter() - began
        if method.deal:
            dealt(line, agreed, pool, seed, keep, run)

    recipe = json.dumps({name: value for name, value in vars(method).items() if name != "budget"})
    tensors = {} if styles is None else {"styles": styles}
    speed = torch.zeros_like(weights)
    for r in range(rounds):
        content = letter(tensors | {"weights": weights}, method=recipe, seed=seed, round=r, rounds=rounds,
                         faults=[float(chance) for chance in vars(faults).values()])
        answers, absent = line.ask("train.update", dict.fromkeys(line.nodes, content))
        for k, (sent, facts) in answers.items():
            costs["train_seconds"] += facts["seconds"]
            if why := checks.weights_refusal(sent.get("weights"), weights, facts.get("images"), images[k]):
                absent[k] = why
        run.missed += [(r + 1, k, why) for k, why in sorted(absent.items())]
        here = [k for k in answers if k not in absent]
        if not here and (answers or not line.nodes):
            raise ValueError(f"no update of round {r + 1} can be used, by hospital: {absent}")
        run.took_part[r, here] = True
        updates = [(answers[k][0]["weights"], images[k]) for k in here]
        mean = engine.aggregate(method, updates, weights) if here else weights  # nobody was there: as it was
        weights, speed = engine.server_step(method, weights, mean, speed)
        costs["bytes_up"] += 4 * len(weights) * len(answers)
        costs["bytes_down"] += 4 * len(weights) * len(answers | absent)
        tell(f"round {r + 1} of {rounds}: {len(here)} of {hospitals} hospitals")

    testers = [k for k in line.nodes if reports[k][1]["tests"]]
    answers, absent = line.ask("evaluate.test", dict.fromkeys(testers, letter(tensors | {"weights": weights})))
    run.missed += [(rounds, k, f"not tested there: {why}") for k, why in absent.items()]
    if not answers:
        raise ValueError(f"no hospital could test the final weights: {absent}")
    run.weights = weights.numpy()
    run.confusions = sum(sent["confusions"] for sent, _ in answers.values()).numpy()[None]
    costs["bytes_up"] += costs["bytes_samples_up"]
    costs["bytes_down"] += costs["bytes_samples_down"]
    tell(f"tested by {len(answers)} of {hospitals} hospitals")
    return run


def refusal(method: Method) -> str:
    """Why a method cannot run over a network, "" where it can."""
    for unfit, why in ((method.scaffold or method.at_home, "keeps weights of its own at each hospital"),
                       (method.trained_at != "hospitals", "trains in one place"),
                       (method.content == "real", "would move real images"),
                       (method.content == "copies" or method.restyled or method.refresh, "shares in its own way")):
        if unfit:
            return f"this method {why}; it runs in one process only, with rounds.run"
    return ""


def simulate(federation: Federation, method: Method, seed: int, *, cores: int = 2, **settings) -> Run:
    """Everything in one go, from Python: Flower's simulation engine takes the place of the network.

    Parameters
    ----------
    cores : int
        Processes that play hospitals in turn.
    settings
        Of `serve`: rounds, patience, faults, tell.
    """
    from flwr.simulation import run_simulation  # here, because it imports Ray, which SuperNodes can do without

    app, result = ServerApp(), []

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        result.append(serve(grid, method, seed, hospitals=len(federation.clients), **settings))

    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder:
        save_hospitals(federation, folder)
        run_simulation(app, app_of_hospitals(folder), len(federation.clients), backend_config={
            "init_args": {"num_cpus": cores, "include_dashboard": False, "log_to_driver": False},
            "client_resources": {"num_cpus": 1}})
    return result[0]


# ---------------------------------------- as an app: what `flwr run` and SuperNodes start

client_app = app_of_hospitals()
server_app = ServerApp()


@server_app.main()
def _main(grid: Grid, context: Context) -> None:
    """The server, as `flwr run` starts it: settings come from the app's configuration, the result goes to a file."""
    from . import experiment  # here, because hospitals can do without pandas

    config = context.run_config
    run = serve(grid, experiment.recipe(experiment.Job(config["method"])), config["seed"], rounds=config["rounds"],
                hospitals=config["hospitals"], patience=float(config["patience"]),
                tell=lambda line: print(line, flush=True))
    experiment.save(run, Path(config["result"]))


# The app is no more than this description: it holds no code, and every hospital runs what it has installed itself.
APP = """[project]
name = "fedssg"
version = "0.1.0"
description = "Federated medical image classification with synthetic sample sharing, for teaching"
license = "MIT"
dependencies = []

[tool.flwr.app]
publisher = "course"

[tool.flwr.app.components]
serverapp = "fedssg_helpers.flower:server_app"
clientapp = "fedssg_helpers.flower:client_app"

[tool.flwr.app.config]
method = "fedavg"  # a name in experiment.METHODS
seed = 0
rounds = 3
hospitals = 3  # how many the server waits for
patience = 600.0  # seconds that an answer may take
result = "../run.npz"  # where the server, in its own folder, writes it; experiment.restore reads it
folder = ".."  # simulation only: where `prepare` put the hospitals' files
"""
CONFIG = """[superlink.simulation]
address = "127.0.0.1:{port}"
insecure = true

[superlink.hospitals]
address = "127.0.0.1:{port}"
root-certificates = "{folder}/ca.crt"
"""


def identity() -> tuple[bytes, bytes]:
    """What a hospital proves its name with: a secret key that stays there, a public one to be registered."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP384R1())
    return (key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH,
                              serialization.NoEncryption()),
            key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH))


def prepare(federation: Federation, folder, port: int = 9092) -> list[Path]:
    """Fill one folder per participant: server, researcher, hospital_0, ... Each holds all that its owner has.

    Returns
    -------
    list of Path
        The files, in order of participants.
    """
    import trustme  # here, because it comes with the extra; a real network has certificates of its institution

    folder, ca = Path(folder).resolve(), trustme.CA()  # its key is kept nowhere, so nobody can sign a second server
    authority, server = ca.cert_pem.bytes(), ca.issue_cert("localhost", "127.0.0.1")
    files = {"server/ca.crt": authority, "server/server.crt": server.cert_chain_pems[0].bytes(),
             "server/server.key": server.private_key_pem.bytes(), "researcher/ca.crt": authority,
             "researcher/app/pyproject.toml": APP.encode(),
             "researcher/config.toml": CONFIG.format(port=port, folder=folder / "researcher").encode()}
    for k in range(len(federation.clients)):
        own, known = identity()
        files |= {f"researcher/hospital_{k}.pub": known, f"hospital_{k}/own.key": own,
                  f"hospital_{k}/ca.crt": authority}
    for name, content in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o600 if file.suffix == ".key" else 0o644)
        file.write_bytes(content)
    return [*(folder / name for name in files), *save_hospitals(federation, folder)]


def commands(hospitals: int, simulated: bool, port: int = 9092, **config) -> dict[str, str]:
    """What each participant types, in this order, in a terminal of its own that is in the folder of `prepare`.

    Parameters
    ----------
    simulated : bool
        True: the hospitals are simulated by one process. False: each is a process with its own file, over TLS.
    port : int
        Of the server. The hospitals' SuperNodes talk to their own subprocesses on the next ones.
    config
        Of the run: method, seed, rounds, patience, result, folder (see `APP`).
    """
    def settings(values: dict) -> str:
        return shlex.quote(" ".join(f"{name}={json.dumps(value)}" for name, value in values.items()))

    server = (f"cd server && FLWR_HOME=. flower-superlink --host 127.0.0.1 --port {port} "
              "--disable-runtime-dependency-installation")
    run, asked = "cd researcher && FLWR_HOME=. flwr run app", settings({"hospitals": hospitals} | config)
    if simulated:
        nodes = settings({"num-supernodes": hospitals, "client-resources-num-cpus": 1, "init-args-num-cpus": 2})
        return {"server": f"{server} --simulation --insecure",
                "run": f"{run} simulation --stream --federation-config {nodes} --run-config {asked}"}
    lines = {"server": f"{server} --ssl-certfile server.crt --ssl-keyfile server.key --ssl-ca-certfile ca.crt "
                       "--enable-supernode-auth"}
    for k in range(hospitals):
        lines[f"register {k}"] = f"cd researcher && FLWR_HOME=. flwr supernode register hospital_{k}.pub hospitals"
    for k in range(hospitals):
        node = settings({"partition-id": k, "data": "data.npz"})
        lines[f"hospital {k}"] = (f"cd hospital_{k} && FLWR_HOME=. flower-supernode --superlink 127.0.0.1:{port} "
                                  f"--root-certificates ca.crt --auth-supernode-private-key own.key "
                                  f"--port {port + 1 + k} --node-config {node}")
    return lines | {"run": f"{run} hospitals --stream --run-config {asked}"}
