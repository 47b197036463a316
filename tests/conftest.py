"""Fixtures that tests of several modules share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # tests run side by side, and a few cores shared by many threads are slow


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with real data sets (FEDSSG_DATA); the test is skipped, with the reason, where there is none."""
    folder = os.environ.get("FEDSSG_DATA", "")
    if not folder:
        pytest.skip("needs real data: set FEDSSG_DATA to a folder that holds ham10000_28.npz")
    if not (Path(folder) / "ham10000_28.npz").is_file():
        pytest.skip(f"needs real data: FEDSSG_DATA is {folder}, but ham10000_28.npz is not there")
    return Path(folder)
