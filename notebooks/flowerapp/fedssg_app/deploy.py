"""Starting it all: `simulate` from Python, or `prepare` and `commands` for a terminal of each participant."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

import fedssg_helpers
from fedssg_helpers import runs
from fedssg_helpers.client import Faults
from fedssg_helpers.methods import Method, describe
from fedssg_helpers.partition import Federation
from fedssg_helpers.server import Run

from . import SETTINGS
from .server_app import refusal
from .task import save_hospitals

APP = Path(__file__).resolve().parents[1]
CONFIG = """[superlink.simulation]
address = "127.0.0.1:{port}"
insecure = true

[superlink.hospitals]
address = "127.0.0.1:{port}"
root-certificates = "{folder}/ca.crt"
"""
# Ray gives its agent 15 seconds to start (github.com/ray-project/ray, issue 65983): too few on a busy machine.
TRIES, SLOW = 3, "timed out during startup"
HERE, EVERYWHERE = "127.0.0.1", "0.0.0.0"
SUPERLINK = "flower-superlink --host {host} --port {port} --disable-runtime-dependency-installation"


def settings(values: dict) -> str:
    """Settings as Flower's command line takes them in one word."""
    return " ".join(f"{name}={json.dumps(value)}" for name, value in values.items())


def nodes(hospitals: int, cores: int) -> str:
    """The settings of a simulated federation."""
    return settings(
        {"num-supernodes": hospitals, "client-resources-num-cpus": 1, "init-args-num-cpus": cores}
    )


# --- all on this machine, from Python ---


def simulate(
    federation: Federation,
    method: Method,
    seed: int,
    *,
    rounds: int,
    epochs: int = 1,
    faults: Faults = Faults(),
    cores: int = 2,
    tell=lambda line: None,
) -> tuple[Run, list[float]]:
    """`server.run` by ``flwr run``: Flower's simulation takes the place of the network.

    Everything is started on this machine, and has ended when this returns.

    Parameters
    ----------
    cores : int
        Processes that play hospitals in turn.
    tell : callable (str)
        Gets each line that ``flwr run`` prints.

    Returns
    -------
    Run, list of float
        The run, and when training began and when each round ended, in seconds; what comes before is Flower's start.

    Raises
    ------
    ValueError
        A method that cannot run over a network (see `server_app.refusal`), or a run that failed, with Flower's words.
    """
    if why := refusal(method):
        raise ValueError(why)
    config = {"method": json.dumps(describe(method)), "seed": int(seed), "rounds": rounds, "epochs": epochs}
    config |= {"hospitals": len(federation.clients)} | vars(faults)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_hospitals(federation, folder, seed)
        config |= {"result": f"{name}/run.npz", "folder": name}
        (folder / "run.toml").write_text(
            "\n".join(f"{key} = {json.dumps(value)}" for key, value in config.items())
        )
        for _ in range(TRIES):
            said = _flwr_run(folder, nodes(len(federation.clients), cores), tell)
            if (folder / "run.json").exists():
                return runs.restore(folder / "run.npz"), json.loads((folder / "run.json").read_text())
            if not any(SLOW in line for line in said):
                break
    if any(SLOW in line for line in said):
        raise ValueError(
            f"Flower's simulation could not start in {TRIES} tries: this machine is too busy; run it again later"
        )
    words = [line for line in said if "Error: " in line] or said or ["nothing"]
    raise ValueError(f"Flower's run ended without a result; its words: {words[-1]}")


def _flwr_run(folder: Path, federation: str, tell) -> list[str]:
    """One ``flwr run`` of the app with the settings in `folder`, on a SuperLink of its own; returns what it printed."""
    port, said = free_port(), []
    (folder / "config.toml").write_text(CONFIG.format(port=port, folder=folder))
    line = ["flwr", "run", str(APP), "simulation", "--stream", "--run-config", str(folder / "run.toml")]
    with program(
        [*SUPERLINK.format(host=HERE, port=port).split(), "--simulation", "--insecure"], folder
    ) as superlink:
        until_listening(port, superlink)
        with program([*line, "--federation-config", federation], folder, subprocess.PIPE) as run:
            for text in run.stdout:
                said.append(text.rstrip())
                tell(said[-1])
    return said


def free_port() -> int:
    """A port of 127.0.0.1 that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(folder: Path) -> dict[str, str]:
    """What Flower's processes need to know: where its programs, the course's helpers and its settings are."""
    places = {"PATH": Path(sys.executable).parent, "PYTHONPATH": Path(fedssg_helpers.__file__).parents[1]}
    paths = {
        name: f"{place}{os.pathsep}{os.environ.get(name, '')}".strip(os.pathsep)
        for name, place in places.items()
    }
    return os.environ | SETTINGS | paths | {"FLWR_HOME": str(folder)}


@contextmanager
def program(words: list[str], folder: Path, output=subprocess.DEVNULL):
    """A program that runs in `folder`; at the end it ends, with all that it has started."""
    env = environment(folder)
    words = [shutil.which(words[0], path=env["PATH"]), *words[1:]]
    started = psutil.Popen(words, cwd=folder, env=env, stdout=output, stderr=subprocess.STDOUT, text=True)
    try:
        yield started
    finally:
        family = []
        with suppress(psutil.NoSuchProcess):
            family = [*started.children(recursive=True), started]
        for end in ("terminate", "kill"):
            for member in family:
                with suppress(psutil.NoSuchProcess):
                    getattr(member, end)()
            family = psutil.wait_procs(family, timeout=10)[1]


def until_listening(port: int, server, seconds: float = 60) -> None:
    """Wait until the server takes calls; a ValueError where it does not."""
    end = time.monotonic() + seconds
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        if server.poll() is not None or time.monotonic() > end:
            raise ValueError(f"Flower's SuperLink does not answer on port {port}")
        time.sleep(0.1)


# --- each participant in a terminal of its own ---


def identity() -> tuple[bytes, bytes]:
    """What a hospital proves its name with: a secret key that stays there, a public one to be registered."""
    from cryptography.hazmat.primitives import serialization as kinds
    from cryptography.hazmat.primitives.asymmetric import ec

    key, pem, ssh = ec.generate_private_key(ec.SECP384R1()), kinds.Encoding.PEM, kinds.Encoding.OpenSSH
    secret = key.private_bytes(pem, kinds.PrivateFormat.OpenSSH, kinds.NoEncryption())
    return secret, key.public_key().public_bytes(ssh, kinds.PublicFormat.OpenSSH)


def prepare(
    federation: Federation, folder, seed: int = 0, port: int = 9092, address: str = HERE
) -> list[Path]:
    """Fill one folder per participant: server, researcher, hospital_0, ... Each holds all that its owner has.

    Parameters
    ----------
    address : str
        Where hospitals reach the server: its certificate is for this address, and for this machine.

    Returns
    -------
    list of Path
        The files, in order of participants.
    """
    import trustme  # here, because only this needs it; a real network has certificates of its institution

    folder, ca = (
        Path(folder).resolve(),
        trustme.CA(),
    )  # its key is kept nowhere, so nobody can sign a second server
    authority, server = ca.cert_pem.bytes(), ca.issue_cert(*dict.fromkeys(("localhost", HERE, address)))
    config = CONFIG.format(port=port, folder=folder / "researcher")
    files = {"server/ca.crt": authority, "server/server.crt": server.cert_chain_pems[0].bytes()}
    files |= {"server/server.key": server.private_key_pem.bytes(), "researcher/ca.crt": authority}
    files |= {"researcher/config.toml": config.encode()}
    files |= {f"researcher/app/{file.relative_to(APP)}": file.read_bytes() for file in sorted(app_files())}
    for k in range(len(federation.clients)):
        secret, public = identity()
        files |= {f"researcher/hospital_{k}.pub": public, f"hospital_{k}/own.key": secret}
        files |= {f"hospital_{k}/ca.crt": authority}
    for name, content in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o600 if file.suffix == ".key" else 0o644)
        file.write_bytes(content)
    return [*(folder / name for name in files), *save_hospitals(federation, folder, seed)]


def app_files() -> list[Path]:
    """The files of the app."""
    return [APP / "pyproject.toml", APP / "LICENSE", *Path(__file__).parent.glob("*.py")]


def commands(
    hospitals: int, simulated: bool, port: int = 9092, address: str = HERE, **config
) -> dict[str, str]:
    """What each participant types, in this order, in a terminal of its own that is in the folder of `prepare`.

    Parameters
    ----------
    simulated : bool
        True: the hospitals are simulated by one process. False: each is a process with its own file, over TLS.
    port : int
        Of the server. The hospitals' SuperNodes talk to their own subprocesses on the next ones.
    address : str
        Of the server, as in `prepare`. With another one than 127.0.0.1 it takes calls from other machines, too.
    config
        Of the run: method, seed, rounds, patience and others, see the app's pyproject.toml.
    """
    server = f"cd server && FLWR_HOME=. {SUPERLINK.format(host=HERE if address == HERE else EVERYWHERE, port=port)}"
    run, asked = (
        "cd researcher && FLWR_HOME=. flwr run app",
        shlex.quote(settings({"hospitals": hospitals} | config)),
    )
    if simulated:
        run = f"{run} simulation --stream --federation-config {shlex.quote(nodes(hospitals, 2))}"
        return {"server": f"{server} --simulation --insecure", "run": f"{run} --run-config {asked}"}
    keys = (
        "--ssl-certfile server.crt --ssl-keyfile server.key --ssl-ca-certfile ca.crt --enable-supernode-auth"
    )
    lines = {"server": f"{server} {keys}"}
    for k in range(hospitals):
        lines[f"register {k}"] = (
            f"cd researcher && FLWR_HOME=. flwr supernode register hospital_{k}.pub hospitals"
        )
    for k in range(hospitals):
        node = f"cd hospital_{k} && FLWR_HOME=. flower-supernode --superlink {address}:{port} --root-certificates ca.crt"
        known = shlex.quote(settings({"partition-id": k, "data": "data.npz"}))
        node = f"{node} --auth-supernode-private-key own.key --port {port + 1 + k}"
        lines[f"hospital {k}"] = f"{node} --node-config {known}"
    return lines | {"run": f"{run} hospitals --stream --run-config {asked}"}
