"""What the server does: the whole conversation with the hospitals, written once.

It asks through a *channel*: ``channel.ask(question, {k: content})`` yields ``(k, answer, why)`` in order of hospitals,
with None for an answer that did not come and the reason why. `Threads` carries questions to hospitals in this process;
the Flower app carries them over a network.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain
from queue import SimpleQueue

import numpy as np
import torch

from . import checks, client, exchange, sharing
from .client import FAULTS, Absence, Faults, Hospital, staying, steps_of
from .errors import require
from .exchange import Shared, before_the_rounds, gather_reports
from .exchange import pretrain as pretrain
from .keys import one_thread, rng
from .methods import Method, Sharing
from .models import Flat
from .partition import Client, Federation


@dataclass
class Run:
    """What a run leaves behind, and all that it needs to go on."""

    weights: np.ndarray  # the global weights, float32 (P,)
    rounds: np.ndarray  # after which rounds it was tested, int64 (E,): 0 (the start), some, and the last
    confusions: np.ndarray  # test confusion matrices per device, int64 (E, D, C, C)
    costs: dict[str, float]  # see COSTS: processor seconds and bytes of all hospitals and rounds together
    took_part: np.ndarray  # whose weights were averaged, bool (rounds so far, K)
    missed: list = field(default_factory=list)  # (round, 0 for sharing; hospital; why) of what did not arrive
    memory: dict = field(default_factory=dict)  # tensors of the server, and of hospitals by "k name"


class Stop(Exception):
    """Raised by ``after_round`` to end a run early; what was reached by then is its result."""


class Threads:
    """A channel to hospitals in this process, on as many threads as there are networks.

    Each question has a network to itself, so results do not depend on the number. `tamper(question, k, content, answer)`
    returns what a faulty or hostile hospital k sends in place of its answer; for lessons and tests.
    """

    def __init__(self, hospitals: list[Hospital], nets: list[Flat], tamper=None):
        self.hospitals, self.tamper, self.free, self.workers = hospitals, tamper, SimpleQueue(), len(nets)
        self.compute = nets[0].weights.device
        for net in nets:
            self.free.put(net)
        self.threads = ThreadPoolExecutor(self.workers, initializer=torch.set_num_threads, initargs=(1,))

    def _answer(self, question: str, k: int, content: dict) -> tuple[int, dict | None, str]:
        net = self.free.get()
        try:
            answer = client.ANSWERS[question](self.hospitals[k], content, net)
            return k, self.tamper(question, k, content, answer) if self.tamper else answer, ""
        except Absence as absence:
            return k, None, str(absence)
        finally:
            self.free.put(net)

    def ask(self, question: str, contents: dict[int, dict]):
        """Yield (k, answer or None, why not) in order; only a few answers wait at a time."""
        waiting = deque()
        for k, content in contents.items():
            if self.workers == 1:
                yield self._answer(question, k, content)
                continue
            waiting.append(self.threads.submit(self._answer, question, k, content))
            if len(waiting) > 2 * self.workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def memories(self) -> dict[str, torch.Tensor]:
        """What hospitals remember, by "k name"; samples are left out, as they can be made again."""
        kept = [(f"{h.k} {name}", x) for h in self.hospitals for name, x in h.home.items()]
        return {name: x for name, x in kept if not name.endswith("received")}

    def remember(self, memory: dict[str, torch.Tensor]) -> None:
        """Give hospitals back what `memories` has of them."""
        for name, value in memory.items():
            if name[0].isdigit():
                k, what = name.split()
                self.hospitals[int(k)].home[what] = value

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.threads.shutdown(cancel_futures=True)


@dataclass
class Conversation:
    """The rounds of one run: what the server knows, and whom it asks to train and to test."""

    method: Method
    trainers: object  # channels
    testers: object
    images: list[int]  # real images of each hospital that trains: its weight in the average
    test_at: list[int]  # hospitals that test
    asked: dict  # goes with every update question
    run: Run
    memory: dict[str, torch.Tensor]
    bytes_each: int  # of weights that travel one way, per hospital and round

    def next_round(self) -> None:
        """Hospitals train, the server checks what comes and aggregates it."""
        method, memory, run = self.method, self.memory, self.run
        run.took_part = np.vstack([run.took_part, np.zeros(len(self.images), bool)])
        before, extras = len(run.missed), {}
        updates = self._updates(extras)
        if (first := next(updates, None)) is not None:
            memory["weights"] = method.server(chain([first], updates), memory["weights"], memory)
        unfit = [(k, why) for _, k, why in run.missed[before:] if why not in FAULTS]
        if first is None and unfit:  # if nobody was there at all, the model stays as it is
            (k, why), r = unfit[0], len(run.took_part)
            raise ValueError(f"no update of round {r} can be used, that of hospital {k} because: {why}")
        method.gradient.gather(memory, extras, len(self.images))
        self.note()

    def _updates(self, extras: dict):
        """Yield (weights, images) of each update that passes the checks; note costs, and who did not take part."""
        run, r, names = self.run, len(self.run.took_part) - 1, ("weights", *self.method.gradient.sends)
        content = self.asked | {"round": r} | {name: self.memory[name] for name in names}
        each = self.bytes_each * len(names)
        for k, answer, why in self.trainers.ask("update", dict.fromkeys(range(len(self.images)), content)):
            run.costs["bytes_down"] += each * (why != FAULTS[0])
            run.costs["bytes_up"] += each * (why in ("", FAULTS[2]))
            if answer:
                numbers = answer.get("images"), self.images[k]
                doubts = [checks.weights_refusal(answer.get(n), content["weights"], *numbers) for n in names]
                why = next(filter(None, [checks.misfit(answer, seconds=0), *doubts]), "")
            if why:
                run.missed.append((r + 1, k, why))
                continue
            run.took_part[r, k] = True
            run.costs["train_seconds"] += answer["seconds"]
            extras[k] = {name: answer[name] for name in names[1:]}
            yield answer["weights"], self.images[k]

    def note(self) -> None:
        """Put what changed into the run."""
        self.run.weights = self.memory["weights"].cpu().numpy()
        self.run.memory = self.memory | self.trainers.memories()

    def test(self) -> None:
        """Test the model (hospitals' own ones, where they differ) as it is now."""
        content = {name: self.asked[name] for name in ("method", "styles") if name in self.asked}
        content, done, seen = content | {"weights": self.memory["weights"]}, len(self.run.took_part), []
        empty = torch.zeros(self.run.confusions.shape[1:], dtype=torch.int64)
        for k, answer, why in self.testers.ask("test", dict.fromkeys(self.test_at, content)):
            if why := why or checks.misfit(answer, confusions=empty):
                self.run.missed.append((done, k, f"not tested there: {why}"))
            else:
                seen.append(answer["confusions"].numpy())
        require(bool(seen), f"the test after round {done}", "unanswered", "answered by one hospital at least")
        self.run.rounds = np.append(self.run.rounds, done)
        self.run.confusions = np.concatenate([self.run.confusions, sum(seen)[None]])

    def all_rounds(self, after_round) -> Run:
        """The rounds that are left, tested about twenty times."""
        run, rounds = self.run, self.asked["rounds"]
        try:
            if not len(run.rounds):
                self.note()
                self.test()
                after_round(0, run)
            for r in range(len(run.took_part), rounds):
                self.next_round()
                if (rounds - 1 - r) % max(1, rounds // 20) == 0:
                    self.test()
                after_round(r + 1, run)
        except Stop:
            if run.rounds[-1] < len(run.took_part):
                self.test()
        return run


def serve(
    channel, hospitals, method, seed, *, rounds, epochs=1, faults=Faults(), after_round=None, go_on=None
) -> Run:
    """The server's whole part of one federated training of so many hospitals, over any channel; see `run`."""
    require(rounds >= 1, "rounds", rounds, "at least 1")
    require(epochs >= 1, "epochs", epochs, "at least 1")
    look = method.view.needs_styles or bool(getattr(method.sharing, "edit", None))
    reports = gather_reports(channel, hospitals, look)
    net = method.network(reports.shape[0], reports.have.shape[1], seed, channel.compute)
    styles = {"styles": reports.styles.to(channel.compute)} if method.view.needs_styles else {}
    fresh = go_on is None
    weights, costs, missed, pool = before_the_rounds(channel, reports, method, seed, net, styles, fresh)
    trainers, images, steps = channel, reports.have.sum((1, 2)).tolist(), 0
    if pool is not None:  # the server alone trains, as many steps as all hospitals would
        alone = Hospital(0, pool, pool.take(slice(0)), (), (), compute=channel.compute)
        trainers = Threads([alone], [net])
        images, steps = [len(pool)], steps_of(sum(images), epochs)
    zeros, (_, classes, devices) = torch.zeros_like(weights), reports.have.shape
    memory = {"weights": weights, "start": weights} | dict.fromkeys(method.gradient.sends, zeros)
    seen = np.empty((0, devices, classes, classes), np.int64)
    there = np.empty((0, len(images)), bool)
    run = Run(weights.numpy(force=True), np.empty(0, int), seen, costs, there, missed)
    if not fresh:
        run, memory = _resumed(go_on, run, rounds, trainers)
    each = 0 if method.pooled or pool is not None else 4 * int((~staying(net, method.stays)).sum())
    asked = dict(rounds=rounds, seed=seed, method=method, epochs=epochs, steps=steps, faults=faults) | styles
    told = Conversation(method, trainers, channel, images, reports.testers, asked, run, memory, each)
    return told.all_rounds(after_round or (lambda r, run: None))


def _resumed(go_on: Run, fresh: Run, rounds: int, channel) -> tuple[Run, dict]:
    """A copy of the run to go on from, and the server's memory; the hospitals get theirs."""
    done, hospitals = go_on.took_part.shape
    same = go_on.weights.shape == fresh.weights.shape and hospitals == fresh.took_part.shape[1]
    found = f"one of {done} rounds, {hospitals} hospitals and {len(go_on.weights)} weights"
    require(same and done <= rounds, "the run to go on from", found, "one of the same parameters")
    memory = {name: tensor.to(channel.compute) for name, tensor in go_on.memory.items()}
    channel.remember(memory)
    run = replace(go_on, costs=dict(go_on.costs), missed=list(go_on.missed))
    return run, {name: tensor.clone() for name, tensor in memory.items() if not name[0].isdigit()}


def home_of_tests(federation: Federation, seed: int) -> torch.Tensor:
    """Which hospital tests each test image, int64 (N,): drawn among those with its device, by their images of it."""
    have = sharing.reports(federation.clients, len(federation.classes), len(federation.devices)).sum(1)
    have = np.where(have.sum(0) > 0, have, have.sum(1, keepdims=True))  # a device of nobody: by all images
    ends = np.cumsum(have / have.sum(0), axis=0)[:, federation.test.device]  # (K, N)
    return torch.from_numpy((rng(seed, "home of a test image").random(ends.shape[1]) >= ends[:-1]).sum(0))


def in_process(federation, method, seed, workers=1, tamper=None, compute="cpu") -> Threads:
    """A channel to the federation's hospitals in this process, each with its share of the test images."""
    require(workers >= 1, "workers", workers, "at least 1")
    clients = [Client.joined(federation.clients)] if method.pooled else federation.clients
    test, names = federation.test, (federation.classes, federation.devices)
    owner = home_of_tests(federation, seed) if method.stays else torch.arange(len(test)) // 512 % len(clients)
    parts = [test.take(owner == k) for k in range(len(clients))]
    hospitals = [Hospital(k, clients[k], parts[k], *names, compute=compute) for k in range(len(clients))]
    nets = [method.network(test.images.shape[1], len(names[0]), seed, compute) for _ in range(workers)]
    return Threads(hospitals, nets, tamper)


@one_thread()
def run(federation, method, seed, *, workers=1, tamper=None, compute="cpu", **settings) -> Run:
    """One federated training: share once, pre-train once, then `rounds` of local training and averaging.

    `rounds` and `epochs` (passes over its real images that a hospital makes in a round), int >= 1. `workers`, int >= 1:
    hospitals that compute side by side, on a thread each; the result is the same to the last bit. `compute`: where
    PyTorch computes, such as "cuda". `faults`: how often hospitals drop out (`client.Faults`); `tamper`: see `Threads`.
    ``after_round(round number, Run so far)`` is called before the first round, with 0, and after every round; it may
    raise `Stop`. `go_on` is the same run as it was after some round, to go on from there, bit for bit; what was shared
    is made again. A ValueError for a parameter out of range, a hospital without images, a `go_on` of another run, or a
    round in which every update was refused (as when training diverges).
    """
    with in_process(federation, method, seed, workers, tamper, compute) as channel:
        return serve(channel, len(channel.hospitals), method, seed, **settings)


@one_thread()
def share(federation: Federation, how: Sharing, seed: int, *, workers: int = 1, tamper=None) -> Shared:
    """The exchange of samples alone: who would receive which, without sending them on or training a classifier."""
    with in_process(federation, Method(), seed, workers, tamper) as channel:
        reports = gather_reports(channel, len(channel.hospitals), bool(how.edit))
        return exchange.exchange(channel, reports, how, seed)
