"""What Flower needs beside the course's own functions: messages, hospitals' files, and what a hospital keeps."""

from __future__ import annotations

import json
from dataclasses import is_dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, RecordDict

from fedssg_helpers.client import Hospital
from fedssg_helpers.data import DataError, need, read_npz
from fedssg_helpers.methods import describe, rebuild
from fedssg_helpers.models import Flat
from fedssg_helpers.partition import Client, Federation
from fedssg_helpers.server import home_of_tests

KINDS = {"report": "query", "generate": "train", "receive": "query", "update": "train", "test": "evaluate"}
PARTS = ("images", "labels", "device")  # of a Client


# --- what travels: plain arrays, numbers and text; no code, no pickle ---


def encode(content: dict) -> RecordDict:
    """The content of a question or an answer, as Flower sends it."""
    tensors = {name: value for name, value in content.items() if isinstance(value, torch.Tensor)}
    parts = {name: json.dumps(describe(value)) for name, value in content.items() if is_dataclass(value)}
    facts = {name: value for name, value in content.items() if name not in tensors | parts}
    return RecordDict(
        {"tensors": ArrayRecord(tensors), "parts": ConfigRecord(parts), "facts": ConfigRecord(facts)}
    )


def decode(record: RecordDict) -> dict:
    """What `encode` was given."""
    parts = {name: rebuild(json.loads(text)) for name, text in record["parts"].items()}
    return record["tensors"].to_torch_state_dict() | parts | dict(record["facts"])


# --- a hospital's file ---


def save_hospitals(federation: Federation, folder, seed: int) -> list[Path]:
    """Write ``hospital_<k>/data.npz`` for each hospital: its images, and the test images that it tests (by `seed`).

    Plain arrays, no pickle: images uint8 (N, C, H, W), labels and device int64 (N,), the same with ``test_`` in front,
    the names of classes and devices, and where they are known the groups of its images, int64 (N,), which never travel.
    """
    files, home = [], home_of_tests(federation, seed)
    for k, own in enumerate(federation.clients):
        arrays = {"classes": np.array(federation.classes), "devices": np.array(federation.devices)}
        for front, images in ("", own), ("test_", federation.test.take(home == k)):
            arrays |= {front + part: getattr(images, part).numpy() for part in PARTS}
        arrays |= {} if own.group is None else {"group": own.group.numpy()}
        files.append(Path(folder) / f"hospital_{k}" / "data.npz")
        files[k].parent.mkdir(parents=True, exist_ok=True)
        np.savez(files[k], **arrays)
    return files


def load_hospital(file, k: int) -> Hospital:
    """Hospital k from its file; a `DataError` where there is none, or not what `save_hospitals` writes."""
    file, cure = (
        Path(file),
        'Write it with task.save_hospitals, and give its path to the SuperNode: data="...".',
    )
    arrays = read_npz(file, cure)
    need(arrays, [*PARTS, *(f"test_{part}" for part in PARTS), "classes", "devices"], file)
    own, tests = (
        Client(*(torch.from_numpy(arrays[front + part]) for part in PARTS)) for front in ("", "test_")
    )
    names = [tuple(map(str, arrays[what])) for what in ("classes", "devices")]
    if "group" in arrays:
        if arrays["group"].shape != (len(own),) or arrays["group"].dtype != np.int64:
            raise DataError(f"{file}: group must be int64, one for each image. {cure}")
        own = replace(own, group=torch.from_numpy(arrays["group"]))
    for images in (own, tests):
        sizes, codes = (
            {len(images.images), *map(len, (images.labels, images.device))},
            (images.labels, images.device),
        )
        whole = all(code.ndim == 1 and code.dtype == torch.int64 for code in codes)
        if images.images.dtype != torch.uint8 or images.images.ndim != 4 or not whole or len(sizes) > 1:
            raise DataError(
                f"{file}: images must be uint8 (N, C, H, W), each with an int64 label and device. {cure}"
            )
        for code, known in zip(codes, names):
            if len(code) and not 0 <= int(code.min()) <= int(code.max()) < len(known):
                raise DataError(f"{file}: has labels or devices beyond its names {', '.join(known)}. {cure}")
    return Hospital(k, own, tests, *names)


@lru_cache(maxsize=1000)
def _loaded(file: Path, changed: int, k: int) -> Hospital:
    """`load_hospital`, once per state of the file: what a hospital works out from its images stays known too."""
    return load_hospital(file, k)


def hospital_of(context: Context) -> Hospital:
    """The hospital of a node, with what it keeps. Simulated ones find their files in the run config's ``folder``."""
    k, node = context.node_config.get("partition-id"), context.node_config
    simulated = "num-partitions" in node
    if k is None or not ("data" in node or simulated):
        cure = "start it with --node-config 'partition-id=0 data=\"data.npz\"'"
        raise ValueError(f"this SuperNode does not say which hospital it is and which data it holds; {cure}")
    file = (
        Path(context.run_config["folder"]) / f"hospital_{k}" / "data.npz" if simulated else Path(node["data"])
    )
    hospital = _loaded(file, file.stat().st_mtime_ns if file.exists() else 0, k)
    remember(hospital, context.state)
    return hospital


# --- what a hospital keeps between questions: Flower's context.state stays at its node ---


def keep(hospital: Hospital, state: RecordDict) -> None:
    """Put what the hospital remembers into the state of its node."""
    home = dict(hospital.home)
    received = home.pop("received")
    state["home"] = ArrayRecord(home | {f"received {part}": getattr(received, part) for part in PARTS})


def remember(hospital: Hospital, state: RecordDict) -> None:
    """Give the hospital back what `keep` kept. Who has received nothing has received an empty set of images."""
    hospital.home = state["home"].to_torch_state_dict() if "home" in state else {}
    none = hospital.data.take(slice(0))
    hospital.keep(Client(*(hospital.home.pop(f"received {part}", getattr(none, part)) for part in PARTS)))


@lru_cache(maxsize=2)
def network(made_by, channels: int, classes: int) -> Flat:
    """Scratch space for a hospital's answers, made once per process."""
    return made_by(channels, classes)
