"""Keyed randomness: a stream belongs to its name and to nothing else."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from fedssg_helpers import keys
from fedssg_helpers.keys import rng, torch_rng

NAMES = list(itertools.product((0, 1), ("batches", "deal"), (0, 1), (0, 1)))  # seed, purpose, client, round


def test_equal_names_give_equal_streams():
    for name in NAMES:
        assert np.array_equal(rng(*name).random(8), rng(*name).random(8))
        assert torch.equal(
            torch.rand(8, generator=torch_rng(*name)), torch.rand(8, generator=torch_rng(*name))
        )


def test_any_change_of_the_name_changes_the_stream():
    assert len({rng(*name).integers(2**62) for name in NAMES}) == len(NAMES)
    drawn = {int(torch.randint(2**62, (1,), generator=torch_rng(*name))) for name in NAMES}
    assert len(drawn) == len(NAMES)


def test_digits_do_not_run_together():
    assert rng(0, "a", 1, 11).integers(2**62) != rng(0, "a", 11, 1).integers(2**62)
    assert rng(1, "1").integers(2**62) != rng(11, "").integers(2**62)


def test_global_generators_play_no_part():
    drawn = []
    for seed in (1, 2):
        np.random.seed(seed), torch.manual_seed(seed)
        drawn.append((rng(3, "x").random(4), torch.rand(4, generator=torch_rng(3, "x"))))
    assert np.array_equal(drawn[0][0], drawn[1][0]) and torch.equal(drawn[0][1], drawn[1][1])


def test_numpy_integers_name_the_same_stream():
    assert rng(np.int64(5), "x", np.int32(2)).random() == rng(5, "x", 2).random()


def test_one_thread_inside_and_as_before_outside():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with keys.one_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 3
        with pytest.raises(KeyboardInterrupt), keys.one_thread():
            raise KeyboardInterrupt
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
