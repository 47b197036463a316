"""The command line: `python -m fedssg_helpers run | doctor | refresh` (each explains itself with --help)."""

from __future__ import annotations

import argparse
import errno
import importlib.util
import os
import shlex
import shutil
import sys
import time
import tomllib
from importlib import metadata
from pathlib import Path

from . import course
from .course import CourseError
from .pages import duration

# `make course` took REFERENCE_MINUTES on a two-core machine on which `speed` gave REFERENCE_RATE.
REFERENCE_MINUTES = 7.4
REFERENCE_RATE = 6900.0
# Arguments of partition.federation, and the lessons' parameters that set them.
DIALS = {"seed": "seed", "count": "hospitals", "alpha": "alpha"}


def arguments(words: list[str]) -> argparse.Namespace:
    """The parsed command line; argparse ends the program with status 2 on a bad one."""
    parser = argparse.ArgumentParser(prog="python -m fedssg_helpers", description="The FedSSG course.")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser(
        "run", help="run the lessons in order; notebooks, pages and results.csv in one folder"
    )
    run.add_argument(
        "--data",
        default="phantom",
        metavar="NAME|FILE.npz",
        help="phantom (built in), ham10000, a MedMNIST name, or your own .npz",
    )
    run.add_argument(
        "--data-dir", metavar="DIR", help="folder with the data files (default: $FEDSSG_DATA, else data/)"
    )
    run.add_argument(
        "--profile",
        choices=course.PROFILES,
        default="quick",
        help="quick: as the lessons stand; full: more rounds and seeds",
    )
    run.add_argument(
        "-p",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        dest="given",
        help="set a lesson's parameter (repeatable)",
    )
    run.add_argument(
        "--out", type=Path, metavar="DIR", help="where results go (default: out/run-DATA-PROFILE)"
    )
    run.add_argument("--resume", action="store_true", help="skip the lessons that an earlier run finished")
    refresh = commands.add_parser(
        "refresh", help="run the committed notebooks again, in place, on the built-in data"
    )
    for command in (run, refresh):
        command.add_argument("--only", action="append", metavar="03", help="only this lesson (repeatable)")
        command.add_argument("--lessons", type=Path, default=course.LESSONS, help=argparse.SUPPRESS)
    commands.add_parser("doctor", help="is this machine ready for class?")
    return parser.parse_args(words)


def run(options: argparse.Namespace) -> None:
    """Check everything that can be checked beforehand, then run the lessons."""
    from . import data, partition

    name, label = options.data, options.data
    if name.endswith(".npz"):
        name, label = str(Path(name).expanduser().resolve()), Path(name).stem
    folder = options.data_dir or os.environ.get("FEDSSG_DATA", "")
    folder = str(Path(folder).expanduser().resolve()) if folder else ""
    default = course.ROOT / "out" / f"run-{label}-{options.profile}"
    out = options.out = (options.out or default).expanduser().resolve()

    paths = course.lessons(options.lessons, options.only)
    common = {"data": name, "data_dir": folder, "out": str(out)} | course.PROFILES[options.profile]
    parameters = course.chosen(paths, common, dict(options.given))
    try:
        loaded = data.load(name, folder or None)
        for values in parameters.values():  # impossible dials (alpha <= 0, more hospitals than lesions) fail here
            dials = {dial: values[name] for dial, name in DIALS.items() if name in values}
            partition.federation(loaded, **dials)
    except ValueError as error:
        raise CourseError(str(error)) from None
    start = time.perf_counter()
    course.run(paths, parameters, out, label, options.profile, options.resume, everything=not options.only)
    count = f"{len(paths)} lesson{'s' * (len(paths) > 1)}"
    print(f"{count} in {duration(time.perf_counter() - start)}. Open {out / 'index.html'}")


def speed(seconds: float = 0.5) -> float:
    """Training images per second of the lessons' own classifier, on one thread."""
    import torch

    from .models import SmallCNN

    net, images = SmallCNN(channels=3, classes=7), torch.rand(32, 3, 28, 28)
    net(images).sum().backward()  # the first call sets up: not counted
    count, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        net(images).sum().backward()
        count += len(images)
    return count / (time.perf_counter() - start)


def checks():
    """Yields (ready, what, finding, cure) for everything that a class needs."""
    yield sys.version_info >= (3, 11), "Python", sys.version.split()[0], "install Python 3.11 or newer"

    project = tomllib.loads((course.ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    install = "run 'make course' or, in your own environment, pip install -e ."
    for line in project["dependencies"]:
        name = line.split(">=")[0]
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield False, name, "not installed", install
            continue
        from packaging.requirements import Requirement  # comes with every one of them

        fits = Requirement(line).specifier.contains(version, prereleases=True)
        yield fits, name, version if fits else f"{version}, outside {line}", install
    try:
        import torch

        # What `import torchvision` does first, without the rest of it (2 s): load its operators into torch.
        vision = importlib.util.find_spec("torchvision").submodule_search_locations[0]
        for library in Path(vision).glob("_C*"):
            torch.ops.load_library(str(library))
        yield torch.ops.torchvision.nms is not None, "torch pair", "torch and torchvision fit together", ""
    except (ImportError, AttributeError, OSError, RuntimeError):
        cure = "pip install --force-reinstall torch torchvision (both in one call)"
        yield False, "torch pair", "torch and torchvision do not fit together", cure

    try:
        from jupyter_client.kernelspec import KernelSpecManager, NoSuchKernel

        try:
            spec = KernelSpecManager().get_kernel_spec("python3")
            own = (
                Path(spec.argv[0]).name == spec.argv[0]
                or Path(spec.argv[0]).parent == Path(sys.executable).parent
            )
            finding = (
                spec.resource_dir if own else f"{spec.resource_dir} starts another Python, {spec.argv[0]}"
            )
            yield (
                own,
                "kernel",
                finding,
                "python -m ipykernel install --sys-prefix; jupyter kernelspec remove the other",
            )
        except NoSuchKernel:
            yield False, "kernel", "none named python3", "python -m ipykernel install --sys-prefix"
    except ImportError:
        yield False, "kernel", "jupyter_client is not installed", install
    widgets = Path(sys.prefix, "share/jupyter/labextensions/@jupyter-widgets/jupyterlab-manager")
    finding = (
        "beside the Jupyter server" if widgets.is_dir() else f"not beside the Jupyter server in {sys.prefix}"
    )
    yield (
        widgets.is_dir(),
        "widgets",
        finding,
        "pip install ipywidgets jupyterlab_widgets into the server's environment",
    )

    found = len(list(course.LESSONS.glob("[0-9][0-9]_*.ipynb")))
    yield found > 0, "lessons", f"{found} in {course.LESSONS}", "clone the whole repository again"
    phantom = course.ROOT / "data" / "phantom.npz"
    finding = "built-in phantom" if phantom.is_file() else f"{phantom} is missing"
    folder = Path(os.environ.get("FEDSSG_DATA") or course.ROOT / "data")
    others = sorted(path.name for path in folder.glob("*.npz") if path.name != phantom.name)
    yield phantom.is_file(), "data", ", ".join([finding, *others]), "git checkout data/phantom.npz"
    free = shutil.disk_usage(course.ROOT).free / 1e9
    yield free >= 1, "disk", f"{free:.0f} GB free", "free at least 1 GB"

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield True, "cores", str(cores), ""
    try:
        minutes = REFERENCE_MINUTES * REFERENCE_RATE / speed() * 2 / min(cores, 2)
        yield True, "time", f"'make course' takes about {max(1, round(minutes))} min here", ""
    except ImportError:
        yield False, "time", "cannot be measured without torch", install


def doctor() -> None:
    """Print one line per check; CourseError (status 1) unless this machine is ready."""
    missing = 0
    for ready, what, finding, cure in checks():
        print(f"{'OK' if ready else 'MISSING':8} {what:12} {finding}", flush=True)
        if not ready:
            missing += 1
            print(f"{'':8} {'':12} cure: {cure}")
    if missing:
        raise CourseError(f"not ready for class: {missing} of the lines above need a cure", code=1)
    print("Ready for class.")


def main(words: list[str] | None = None) -> int:
    """Run one command; every fault that a user can mend is one sentence on stderr, not a traceback.

    Status: 0 done, 1 a lesson failed or the machine is not ready, 2 wrong input, 130 stopped by Ctrl-C.
    """
    words = sys.argv[1:] if words is None else words
    options = arguments(words)
    own = Path(sys.executable)  # shown as typed in the project's folder: .venv/bin/python
    python = str(own.relative_to(Path.cwd())) if own.is_relative_to(Path.cwd()) else "python"
    again = shlex.join([python, "-m", "fedssg_helpers", *words])
    again += "" if "--resume" in words else " --resume"
    try:
        if options.command == "run":
            run(options)
        elif options.command == "refresh":
            course.refresh(course.lessons(options.lessons, options.only))
        else:
            doctor()
        return 0
    except CourseError as error:
        print(f"error: {error}", file=sys.stderr)
        if options.command == "run" and error.code == 1:
            print(f"What ran is kept. When it is mended, go on with: {again}", file=sys.stderr)
        return error.code
    except ModuleNotFoundError as error:
        print(
            f"error: the package '{error.name}' is missing: pip install -e . installs all of them",
            file=sys.stderr,
        )
        return 2
    except OSError as error:
        where = error.filename or getattr(options, "out", None) or "a file"
        print(f"error: cannot read or write {where}: {error.strerror or error}", file=sys.stderr)
        if error.errno == errno.ENOSPC and options.command == "run":
            print(f"What ran is kept. When there is space again, go on with: {again}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nStopped." + (f" Go on with: {again}" if options.command == "run" else ""), file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
