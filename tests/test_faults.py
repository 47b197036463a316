"""Hospitals that drop out, die, come late, lie or diverge; runs that are stopped, or killed at any moment."""
from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from kills import equal, killed_and_resumed, rounds_done, tiny_data
from test_rounds import SHARE, federation

from fedssg_helpers import checks, experiment, rounds
from fedssg_helpers.experiment import METHODS, Job
from fedssg_helpers.keys import rng
from fedssg_helpers.rounds import Faults, Method, average

EVERY_MEMORY = {"momentum": Method(server_momentum=0.5), "scaffold": Method(scaffold=True), "norm": METHODS["local_normalisation"],
                "alone": METHODS["local_only"], "refresh": replace(SHARE, refresh=True, pretrain_steps=8, drop=0.2),
                "statistics": replace(SHARE, device_statistics=True, share=0.3, decay=True),
                "centre": METHODS["centralised"]}


# ------------------------------------------------------------------------------------------------- the same, whatever

@pytest.mark.parametrize("name", EVERY_MEMORY)
def test_threads_stops_and_files_change_no_bit(name, tmp_path):
    """Three workers, stopped and written to disk and read again after every round: the run of one go."""
    dealt, method, faults = federation(), EVERY_MEMORY[name], Faults(drop=0.2, die=0.1, late=0.1)
    whole, run = rounds.run(dealt, method, 0, rounds=4, faults=faults), None
    for stop in range(5):

        def after_round(r, so_far, stop=stop):
            if r == stop:
                experiment.save(so_far, tmp_path / "state.npz")
                raise rounds.Stop

        run = rounds.run(dealt, method, 0, rounds=4, faults=faults, workers=3, go_on=run, after_round=after_round)
        assert len(run.took_part) == stop == run.rounds[-1]
        run = experiment.restore(tmp_path / "state.npz")
    run = rounds.run(dealt, method, 0, rounds=4, faults=faults, go_on=run)
    assert np.array_equal(run.weights, whole.weights) and equal(run, whole)


def test_a_stopped_run_is_usable():
    def stop(r, so_far):
        if r == 23:
            raise rounds.Stop

    run = rounds.run(federation((20, 20)), Method(), 0, rounds=100, after_round=stop)
    assert run.rounds[-1] == 23 == len(run.took_part)  # tested where it stopped, though 23 is no multiple of 5
    assert np.array_equal(run.confusions[-1].sum((1, 2)), [30, 30])


def test_going_on_leaves_the_earlier_run_as_it_was():
    short = rounds.run(federation(), Method(scaffold=True), 0, rounds=3, after_round=lambda r, run: stop_at(r, 1))
    before = short.weights.copy(), short.memory["controls"].clone()
    ends = [rounds.run(federation(), Method(scaffold=True), 0, rounds=3, go_on=short) for _ in range(2)]
    assert equal(*ends) and len(short.took_part) == 1 and ends[0] is not short
    assert np.array_equal(short.weights, before[0]) and torch.equal(short.memory["controls"], before[1])


def stop_at(r: int, end: int) -> None:
    if r == end:
        raise rounds.Stop


def test_going_on_from_another_run_is_refused():
    short = rounds.run(federation(), Method(), 0, rounds=2)
    for other, options in ((federation((60, 33)), {"rounds": 3}), (federation(), {"rounds": 1})):
        with pytest.raises(ValueError, match="belongs to other parameters"):
            rounds.run(other, Method(), 0, go_on=short, **options)


@pytest.mark.parametrize("options", [{"rounds": 0}, {"rounds": 1, "epochs": 0}, {"rounds": 1, "workers": 0}])
def test_impossible_numbers_are_named(options):
    with pytest.raises(ValueError, match="at least 1 is needed"):
        rounds.run(federation(), Method(), 0, **options)


def test_more_epochs_are_more_steps(monkeypatch):
    steps = []
    monkeypatch.setattr(rounds, "train_local", lambda net, start, *a, **k: steps.append(k["steps"]) or start)
    for epochs in (1, 3):
        rounds.run(federation((60, 33)), Method(), 0, rounds=1, epochs=epochs)
    assert steps == [2, 2, 6, 6]


def test_results_come_in_order_and_few_wait():
    nets, started = [object(), object()], []

    def work(net, item):
        started.append(item)
        time.sleep(0.02 if item == 0 else 0)
        return item, net

    ahead = []
    with ThreadPoolExecutor(2) as threads:
        for item, net in rounds.side_by_side(work, iter(range(40)), nets, threads):
            ahead.append(len(started) - item)
            assert net in nets
    assert started and sorted(started) == list(range(40)) and max(ahead) <= 8


# ----------------------------------------------------------------------------------------------------------- faults

def test_faults_are_keyed_and_as_frequent_as_asked():
    faults = Faults(drop=0.3, die=0.1, late=0.2)
    fates = [faults.of(0, k, r) for k in range(40) for r in range(40)]
    assert fates == [faults.of(0, k, r) for k in range(40) for r in range(40)]
    part = {why: fates.count(why) / len(fates) for why in set(fates)}
    assert part == pytest.approx({"dropped out": 0.3, "died in the round": 0.1, "came late": 0.2, "": 0.4}, abs=0.04)


@pytest.mark.parametrize("chances", [{"drop": -0.1}, {"drop": 0.6, "die": 0.6}, {"late": 2}])
def test_impossible_chances_are_named(chances):
    with pytest.raises(ValueError, match="sum at most 1"):
        Faults(**chances)


def test_the_average_is_over_those_who_took_part():
    """Against the closed form: local updates of those present, weighted by their images alone."""
    dealt, faults, seed = federation(), Faults(drop=0.4, die=0.2), 0
    seen = []
    run = rounds.run(dealt, Method(), seed, rounds=1, faults=faults, tamper=lambda k, r, start, sent: seen.append((k, sent)) or sent)
    here = [k for k in range(3) if not faults.of(seed, k, 0)]
    assert 0 < len(here) < 3 and run.took_part.tolist() == [[k in here for k in range(3)]]
    assert [k for k, _ in seen] == here
    size = np.array([len(dealt.clients[k]) for k in here])
    closed = sum(float(n) / size.sum() * w.double() for n, (_, w) in zip(size, seen))
    assert np.allclose(run.weights, closed.numpy(), atol=1e-6)
    assert [(r, k) for r, k, _ in run.missed] == [(1, k) for k in range(3) if k not in here]


def test_bytes_follow_the_faults():
    dealt = federation()
    plain = rounds.run(dealt, Method(), 0, rounds=2).costs
    for chances, up, down in (({"drop": 1.0}, 0, 0), ({"die": 1.0}, 0, 1), ({"late": 1.0}, 1, 1)):
        run = rounds.run(dealt, Method(), 0, rounds=2, faults=Faults(**chances))
        assert run.costs["bytes_up"] == up * plain["bytes_up"] and run.costs["bytes_down"] == down * plain["bytes_down"]
        assert np.array_equal(run.weights, run.memory["start"]) and not run.took_part.any()  # nobody: the model stays


# ------------------------------------------------------------------------------------------- hostile and broken updates

WRONG = {"not finite": lambda w: w * float("nan"), "float64": lambda w: w.double(), "shape": lambda w: w[:-1],
         "list": lambda w: w.tolist()}


@pytest.mark.parametrize("word", WRONG)
def test_a_bad_update_is_refused_and_the_round_goes_on(word):
    dealt = federation()
    run = rounds.run(dealt, Method(), 0, rounds=2, tamper=lambda k, r, start, sent: WRONG[word](sent) if k == 1 else sent)
    assert run.took_part.tolist() == [[True, False, True]] * 2
    assert [(r, k) for r, k, _ in run.missed] == [(1, 1), (2, 1)] and word in run.missed[0][2]
    assert np.isfinite(run.weights).all()


def test_refused_at_a_hospital_that_keeps_weights_leaves_them_alone():
    run = rounds.run(federation(), METHODS["local_only"], 0, rounds=1,
                     tamper=lambda k, r, start, sent: WRONG["not finite"](sent) if k == 1 else sent)
    assert torch.equal(run.memory["own"][1], run.memory["start"]) and not torch.equal(run.memory["own"][0], run.memory["start"])


def test_median_and_clipping_bound_one_scaled_update():
    """One of five sends its step times 100; the mean follows it, the robust aggregates stay near the honest steps."""
    random = rng(0, "updates")
    start = torch.from_numpy(random.standard_normal(50).astype(np.float32))
    steps = [torch.from_numpy(random.standard_normal(50).astype(np.float32)) for _ in range(5)]
    honest = [(start + step, 10) for step in steps]
    hostile = [(start + 100 * steps[0], 10), *honest[1:]]
    longest = max(float(step.norm()) for step in steps)
    far = {name: float((rounds.aggregate(Method(aggregate=name), iter(hostile), start) - average(honest)).norm())
           for name in ("mean", "median", "clip")}
    assert far["mean"] > 10 * longest and far["median"] < longest and far["clip"] < longest


def test_robust_aggregates_of_equal_updates_are_the_mean():
    start = torch.zeros(4)
    updates = [(torch.tensor([1.0, -2.0, 3.0, 0.0]), n) for n in (1, 2, 3)]
    assert torch.equal(rounds.median(updates), average(updates))
    assert torch.allclose(rounds.clipped(updates, start), average(updates))
    even = [(torch.tensor([float(x)]), 1) for x in (1, 2, 10, 50)]
    assert rounds.median(even) == 6  # the middle of the two in the middle


def test_clipping_shortens_to_the_median_length_and_leaves_shorter_ones():
    start = torch.ones(2)
    updates = [(start + torch.tensor(step), 1) for step in ((1.0, 0.0), (0.0, 2.0), (8.0, 0.0))]
    expected = start + torch.tensor([(1.0 + 2.0) / 3, 2.0 / 3])
    assert torch.allclose(rounds.clipped(updates, start), expected)


@pytest.mark.parametrize("aggregate", ["mean", "median", "clip"])
def test_every_aggregate_learns(aggregate):
    run = rounds.run(federation((200, 200)), Method(balanced=True, aggregate=aggregate), 0, rounds=8)
    right = np.trace(run.confusions.sum(1), axis1=1, axis2=2) / 60
    assert right[-1] > 0.6


def test_an_unknown_aggregate_is_named():
    with pytest.raises(ValueError, match="aggregate is 'best'"):
        Method(aggregate="best")


def test_the_number_of_images_is_what_was_reported():
    like = torch.zeros(3)
    assert checks.weights_refusal(like, like, 5, 5) == ""
    assert "reported 5" in checks.weights_refusal(like, like, 500, 5)
    assert "whole" in checks.weights_refusal(like, like, 2.5, 5)


# ------------------------------------------------------------------------------------------------------------- kill -9

def test_twenty_kills_resume_to_the_same_bits(tmp_path):
    """kill -9 at a random moment after a random round, twenty times; the run that goes on ends as if nothing had been."""
    data = tiny_data(tmp_path)
    recipes = {"fedavg": None, "scaffold": None, "fedavgm": None, "local_normalisation": None,
               "shared": replace(METHODS["fedssg"], pretrain_steps=8, refresh=True)}
    jobs = [Job(name, 0, 12, data, recipe=recipe) for name, recipe in recipes.items()]
    whole = [experiment.execute(job, tmp_path / "whole") for job in jobs]
    left = []
    for trial in range(20):
        was_left, run = killed_and_resumed(jobs[trial % 5], tmp_path / str(trial), trial)
        left.append(was_left)
        assert equal(run, whole[trial % 5]), (trial, jobs[trial % 5])
    assert sum(left) >= 15  # a few may have been through


def test_a_killed_comparison_leaves_no_worker_behind(tmp_path):
    jobs = [Job("fedavg", seed, 20_000, tiny_data(tmp_path)) for seed in (0, 1)]
    states = [experiment.cache_file(job, tmp_path).with_suffix(".state.npz") for job in jobs]
    parent = experiment.processes().Process(target=experiment.run_many, args=(jobs, str(tmp_path)))
    parent.start()
    while not all(state.exists() for state in states):
        assert parent.is_alive()
        time.sleep(0.05)
    parent.kill()
    parent.join()
    patience = time.monotonic() + 60
    while (done := [rounds_done(state) for state in states]) != (time.sleep(3) or [rounds_done(s) for s in states]):
        assert time.monotonic() < patience
    assert max(done) < 20_000  # they ended with whoever had asked, not when they were through
