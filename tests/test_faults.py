"""Hospitals that drop out, die, come late, lie or diverge; runs that are stopped, or killed at any moment."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from kills import equal, killed_and_resumed, rounds_done, tiny_data
from small import SHARE, federation

from fedssg_helpers import client, runs, server
from fedssg_helpers.client import Faults
from fedssg_helpers.methods import METHODS, DeviceStyles, Method, Scaffold
from fedssg_helpers.runs import Job
from fedssg_helpers.server import Stop

SHORT = replace(METHODS["fedssg"].sharing, budget=SHARE.sharing.budget, pretrain_steps=8)
STATEFUL = {name: METHODS[name] for name in ("fedavgm", "scaffold", "local_normalisation", "local_only")} | {
    "fedssg": replace(METHODS["fedssg"], sharing=SHORT),
    "styles": replace(SHARE, view=DeviceStyles()),
    "server only": replace(METHODS["synthetic_only"], sharing=replace(SHORT, to="server only")),
    "server only, scaffold": Method(gradient=Scaffold(), sharing=replace(SHORT, to="server only")),
    "pooled": METHODS["centralised"],
}


# ---------------------------------------- the same, whatever


@pytest.mark.parametrize("name", STATEFUL)
def test_threads_stops_and_files_change_no_bit(name, tmp_path):
    """Three workers, stopped and written to disk and read again after every round: the run of one go."""
    hospitals, method, faults = federation(), STATEFUL[name], Faults(absent=0.2, die=0.1, late=0.1)
    whole, run = server.run(hospitals, method, 0, rounds=4, faults=faults), None
    for stop in range(5):

        def after_round(r, so_far, stop=stop):
            if r == stop:
                runs.save(so_far, tmp_path / "state.npz")
                raise Stop

        known = {"rounds": 4, "faults": faults, "go_on": run, "after_round": after_round}
        run = server.run(hospitals, method, 0, workers=3, **known)
        assert len(run.took_part) == stop == run.rounds[-1]
        run = runs.restore(tmp_path / "state.npz")
    assert equal(server.run(hospitals, method, 0, rounds=4, faults=faults, go_on=run), whole)


def stop_at(end: int):
    """An `after_round` that stops the run there."""

    def after_round(r, run):
        if r == end:
            raise Stop

    return after_round


def test_a_stopped_run_is_usable():
    run = server.run(federation((20, 20)), Method(), 0, rounds=100, after_round=stop_at(23))
    assert (
        run.rounds[-1] == 23 == len(run.took_part)
    )  # tested where it stopped, though 23 is no multiple of 5
    assert np.array_equal(run.confusions[-1].sum((1, 2)), [30, 30])


def test_going_on_leaves_the_earlier_run_as_it_was():
    method = METHODS["scaffold"]
    short = server.run(federation(), method, 0, rounds=3, after_round=stop_at(1))
    before = short.weights.copy(), {name: tensor.clone() for name, tensor in short.memory.items()}
    ends = [server.run(federation(), method, 0, rounds=3, go_on=short) for _ in range(2)]
    assert equal(*ends) and len(short.took_part) == 1 and ends[0] is not short
    assert np.array_equal(short.weights, before[0])
    assert all(torch.equal(tensor, before[1][name]) for name, tensor in short.memory.items())


def test_going_on_from_another_run_is_refused():
    short = server.run(federation(), Method(), 0, rounds=2)
    for other, options in ((federation((60, 33)), {"rounds": 3}), (federation(), {"rounds": 1})):
        with pytest.raises(ValueError, match="go on from .* same parameters|belongs to other parameters"):
            server.run(other, Method(), 0, go_on=short, **options)


def test_answers_come_in_order_and_few_wait(monkeypatch):
    started, channel = [], server.in_process(federation((5,) * 40), Method(), 0, workers=2)

    def answer(hospital, content, net):
        started.append(hospital.k)
        time.sleep(0.02 if hospital.k == 0 else 0)
        return {"k": hospital.k}

    monkeypatch.setitem(client.ANSWERS, "update", answer)
    ahead = []
    with channel:
        for n, (k, answered, why) in enumerate(channel.ask("update", dict.fromkeys(range(40), {}))):
            assert n == k == answered["k"] and why == ""
            ahead.append(len(started) - k)
    assert sorted(started) == list(range(40)) and max(ahead) <= 8


# ---------------------------------------- faults


def test_faults_are_keyed_and_as_frequent_as_asked():
    faults = Faults(absent=0.3, die=0.1, late=0.2)
    fates = [faults.of(0, k, r) for k in range(40) for r in range(40)]
    assert fates == [faults.of(0, k, r) for k in range(40) for r in range(40)]
    found = {why: fates.count(why) / len(fates) for why in set(fates)}
    expected = {"dropped out": 0.3, "died in the round": 0.1, "came late": 0.2, "": 0.4}
    assert found == pytest.approx(expected, abs=0.04)


@pytest.mark.parametrize("chances", [{"absent": -0.1}, {"absent": 0.6, "die": 0.6}, {"late": 2}])
def test_impossible_chances_are_named(chances):
    with pytest.raises(ValueError, match="0 or more each, and 1 at most together"):
        Faults(**chances)


def test_the_average_is_over_those_who_took_part():
    """Against the closed form: local updates of those present, weighted by their images alone."""
    hospitals, faults, sent = federation(), Faults(absent=0.4, die=0.2), {}

    def note(question, k, content, answer):
        if question == "update":
            sent[k] = answer["weights"]
        return answer

    run = server.run(hospitals, Method(), 0, rounds=1, faults=faults, tamper=note)
    here = [k for k in range(3) if not faults.of(0, k, 0)]
    assert 0 < len(here) < 3 and run.took_part.tolist() == [[k in here for k in range(3)]]
    assert list(sent) == here
    size = np.array([len(hospitals.clients[k]) for k in here])
    closed = sum(float(n) / size.sum() * w.double() for n, w in zip(size, sent.values()))
    assert np.allclose(run.weights, closed.numpy(), atol=1e-6)
    assert [(r, k) for r, k, _ in run.missed] == [(1, k) for k in range(3) if k not in here]


def test_bytes_follow_the_faults():
    hospitals = federation()
    plain = server.run(hospitals, Method(), 0, rounds=2).costs
    for chances, up, down in (({"absent": 1.0}, 0, 0), ({"die": 1.0}, 0, 1), ({"late": 1.0}, 1, 1)):
        run = server.run(hospitals, Method(), 0, rounds=2, faults=Faults(**chances))
        assert run.costs["bytes_up"] == up * plain["bytes_up"]
        assert run.costs["bytes_down"] == down * plain["bytes_down"]
        assert np.array_equal(run.weights, run.memory["start"]) and not run.took_part.any()  # the model stays


# ---------------------------------------- hostile and broken updates


WRONG = {
    "not finite": lambda w: w * float("nan"),
    "float64": lambda w: w.double(),
    "shape": lambda w: w[:-1],
    "list": lambda w: w.tolist(),
}


def spoiled(word: str, name: str = "weights"):
    """A `tamper`: hospital 1 spoils what it sends after each round."""

    def tamper(question, k, content, answer):
        return answer | {name: WRONG[word](answer[name])} if (question, k) == ("update", 1) else answer

    return tamper


@pytest.mark.parametrize("word, name", [*((word, "weights") for word in WRONG), ("shape", "control")])
def test_a_bad_update_is_refused_and_the_round_goes_on(word, name):
    method = METHODS["scaffold"] if name == "control" else Method()
    run = server.run(federation(), method, 0, rounds=2, tamper=spoiled(word, name))
    assert run.took_part.tolist() == [[True, False, True]] * 2
    assert [(r, k) for r, k, _ in run.missed] == [(1, 1), (2, 1)] and word in run.missed[0][2]
    assert np.isfinite(run.weights).all()


def test_what_diverged_is_not_kept_by_a_hospital_that_keeps_weights(monkeypatch):
    real = client.train_local

    def diverges(net, start, images, labels, *, own, **rest):
        return start * float("nan") if own == 33 else real(net, start, images, labels, own=own, **rest)

    monkeypatch.setattr(client, "train_local", diverges)
    run = server.run(federation(), METHODS["local_only"], 0, rounds=2)
    assert "0 own" in run.memory and "1 own" not in run.memory and np.isfinite(run.confusions).all()


# ---------------------------------------- kill -9


def test_kills_resume_to_the_same_bits(tmp_path):
    """kill -9 at a random moment after a random round; the run that goes on ends as if nothing had been.

    Twenty kills are the trust appendix's.
    """
    data, left = tiny_data(tmp_path), []
    recipes = {"fedavg": None, "scaffold": None, "fedavgm": None, "local_normalisation": None}
    recipes["shared"] = replace(METHODS["fedssg"], sharing=replace(SHORT, pretrain_steps=8))
    jobs = [Job(name, 0, 12, data, recipe=recipe) for name, recipe in recipes.items()]
    whole = [runs.execute(job, tmp_path / "whole") for job in jobs]
    for trial in range(10):
        was_left, run = killed_and_resumed(jobs[trial % 5], tmp_path / str(trial), trial)
        left.append(was_left)
        assert equal(run, whole[trial % 5]), (trial, jobs[trial % 5])
    assert sum(left) >= 7  # a few may have been through


def test_a_killed_comparison_leaves_no_worker_behind(tmp_path):
    jobs = [Job("fedavg", seed, 20_000, tiny_data(tmp_path)) for seed in (0, 1)]
    states = [runs.cache_file(job, tmp_path).with_suffix(".state.npz") for job in jobs]
    parent = runs.processes().Process(target=runs.run_many, args=(jobs, str(tmp_path)))
    parent.start()
    while not all(state.exists() for state in states):
        assert parent.is_alive()
        time.sleep(0.05)
    parent.kill()
    parent.join()
    patience = time.monotonic() + 60
    while (done := [*map(rounds_done, states)]) != (time.sleep(2) or [*map(rounds_done, states)]):
        assert time.monotonic() < patience
    assert max(done) < 20_000  # they ended with whoever had asked, not when they were through
