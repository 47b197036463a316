"""Keyed randomness: a stream belongs to its name and to nothing else."""
from __future__ import annotations

import itertools

import numpy as np
import torch

from fedssg_helpers.keys import rng, torch_rng

NAMES = list(itertools.product((0, 1), ("batches", "deal"), (0, 1), (0, 1)))  # seed, purpose, client, round


def test_equal_names_give_equal_streams():
    for name in NAMES:
        assert np.array_equal(rng(*name).random(8), rng(*name).random(8))
        assert torch.equal(torch.rand(8, generator=torch_rng(*name)), torch.rand(8, generator=torch_rng(*name)))


def test_any_change_of_the_name_changes_the_stream():
    assert len({rng(*name).integers(2**62) for name in NAMES}) == len(NAMES)
    assert len({int(torch.randint(2**62, (1,), generator=torch_rng(*name))) for name in NAMES}) == len(NAMES)


def test_digits_do_not_run_together():
    assert rng(0, "a", 1, 11).integers(2**62) != rng(0, "a", 11, 1).integers(2**62)
    assert rng(1, "1").integers(2**62) != rng(11, "").integers(2**62)


def test_global_generators_play_no_part():
    np.random.seed(1), torch.manual_seed(1)
    first = rng(3, "x").random(4), torch.rand(4, generator=torch_rng(3, "x"))
    np.random.seed(2), torch.manual_seed(2)
    second = rng(3, "x").random(4), torch.rand(4, generator=torch_rng(3, "x"))
    assert np.array_equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_numpy_integers_name_the_same_stream():
    assert rng(np.int64(5), "x", np.int32(2)).random() == rng(5, "x", 2).random()


def test_one_thread():
    assert torch.get_num_threads() == 1
