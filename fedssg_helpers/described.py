"""Methods and parts as plain data: for messages, and to know a finished run again."""

from __future__ import annotations

import dis
import functools
import hashlib
import inspect
import sys
import sysconfig
from dataclasses import fields, is_dataclass
from pathlib import Path

import cloudpickle
import numpy as np
import torch


def describe(value, seen=()):
    """A method or part as JSON data: name and fields; your own classes and functions with all that they consist of."""
    value = _plain(value)
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, tuple | list):
        return [describe(item, seen) for item in value]
    if isinstance(value, dict):
        return {str(key): describe(item, seen) for key, item in value.items()}
    kind = value if inspect.isroutine(value) or isinstance(value, type) else type(value)
    entry = {"part": kind.__name__}
    if kind is not value and (is_dataclass(value) or _own(kind)):
        names = [f.name for f in fields(value)] if is_dataclass(value) else vars(value)
        entry |= {name: describe(getattr(value, name), seen) for name in names}
    elif kind is not value:  # a library's object
        entry["pickle"] = hashlib.sha256(cloudpickle.dumps(value)).hexdigest()
    if _own(kind) and kind not in seen:
        entry["source code"] = _consists_of(kind, (*seen, kind))
    return entry


def _plain(value):
    """What says the same with plain Python values, where there is such."""
    if isinstance(value, torch.Tensor | np.generic):
        return value.numpy(force=True) if isinstance(value, torch.Tensor) else value.item()
    if isinstance(value, set | frozenset):
        return sorted(value, key=repr)
    if isinstance(value, functools.partial):
        return [value.func, value.args, value.keywords]
    if inspect.ismethod(value):
        return [value.__self__, value.__func__]
    return Path(value.__file__).read_text(encoding="utf-8") if inspect.ismodule(value) else value


def _own(code) -> bool:
    """Is this a class, function or module that is neither Python's, nor an installed package's, nor the course's?"""
    if not (inspect.ismodule(code) or isinstance(code, type) or hasattr(inspect.unwrap(code), "__code__")):
        return False
    name = code.__name__ if inspect.ismodule(code) else code.__module__ or "__main__"
    file = getattr(sys.modules.get(name), "__file__", None) or ""
    installed = "site-packages" in file or file.startswith(sysconfig.get_path("stdlib"))
    yours = file and not installed and name.split(".")[0] != __package__
    return name == "__main__" or name not in sys.modules or bool(yours)


def _consists_of(own, seen) -> list:
    """Instructions and constants of your own function, or of a class's methods, with the values and code they use."""
    if isinstance(own, type):
        kept = ("__call__", "__post_init__", "__init__")[: 2 if is_dataclass(own) else 3]
        members = {n: v for n, v in vars(own).items() if n in kept or not n.startswith(("__", "_abc"))}
        members = {n: getattr(v, "fget", getattr(v, "__func__", v)) for n, v in members.items()}
        return describe([own.__bases__, members], seen)
    own = own if hasattr(own, "__code__") else inspect.unwrap(own)
    codes = [own.__code__]
    for code in codes:  # and the functions inside
        codes += filter(inspect.iscode, code.co_consts)
    names = {i.argval for code in codes for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"}
    used = {name: own.__globals__[name] for name in sorted(names & set(own.__globals__))}
    used |= {n: cell.cell_contents for n, cell in zip(own.__code__.co_freevars, own.__closure__ or ())}
    code_of_others = inspect.ismodule, inspect.isroutine, inspect.isclass
    used = {n: v for n, v in used.items() if _own(v) or not any(is_(v) for is_ in code_of_others)}
    constants = [[repr(_plain(x)) for x in code.co_consts if not inspect.iscode(x)] for code in codes]
    text = [[code.co_code.hex(), list(code.co_names)] for code in codes]
    return [text, constants, describe([own.__defaults__, own.__kwdefaults__, used], seen)]
