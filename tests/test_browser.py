"""Every explorer in a real JupyterLab: each dial is moved by keyboard, and the picture or its words must follow.

Screenshots at 1280 x 800 go to ``screens`` in the FEDSSG_OUT folder. FEDSSG_BROWSER=required makes a missing browser
a failure, not a skip.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell
from slices import needed

from fedssg_helpers import course, runs

pytestmark = pytest.mark.browser
TOKEN = "explorers-under-test"
PATIENCE = 180  # seconds until something that should happen counts as missing: on a busy machine, too
CALLS = ("explore.explorer(", "explore.live(")
PAGES = [
    path
    for path in sorted(course.LESSONS.glob("*.ipynb"))
    if any(call in path.read_text(encoding="utf-8") for call in CALLS)
]
SCREENS = runs.out_folder() / "screens"
# Small runs, put in behind the parameters and the imports: what a dial does, they show as well.
SMALL = {"rounds": 2, "seeds": 1, "workers": 1}
FEWER = 'methods.LESSON = ("fedavg", "balanced_sampling", "fedssg_no_pretrain", "fedssg")'
FLAGS = (
    "--no-sandbox --disable-gpu --disable-background-networking --disable-component-update --disable-sync "
    "--disable-quic --no-first-run"
).split()
# What the words above a picture must do when a dial is moved by so many arrow keys to the right (or down a list): the
# number in brackets rises (+) or falls (-); "name": they name the choice; "picture": no number goes with it.
MOVES = {
    "00": {
        "hospital": (1, r"^hospital (\d+) holds", "+"),
        "beside": (-1, r"; hospital (\d+) holds", "-"),
        "other images": (1, "", "picture"),
    },
    "01": {
        "hospitals": (5, r"images at (\d+) hospital", "+"),
        "class skew: alpha": (3, r"label divergence ([.\d]+)", "-"),
        "device skew: mix": (5, r"device divergence ([.\d]+)", "-"),
        "long tail": (9, r"rarest class: (\d+)", "-"),
        "size skew": (6, r"the largest with (\d+)", "+"),
        "look into hospital": (1, "", "picture"),
    },
    "02": {
        "cell": (1, "", "name"),
        "first axis": (2, r"lies ([.\d]+)", "+"),
        "second axis": (-2, r"lies ([.\d]+)", "+"),
        "temperature": (1, r"stray ([.\d]+)", "+"),
        "training images": (2, r"within ([.\d]+)", "-"),
    },
    "03": {
        "rule": (1, "", "name"),
        "fill": (4, "", "picture"),
        "cell (floor)": (2, "", "picture"),
        "per image": (-2, r"up ([.\d]+) MB", "-"),
        "receive": (-8, r"to (\d+) to each", "-"),
        "may not share": (5, "", "picture"),
    },
    "04": {
        "method": (1, "", "name"),
        "against": (-1, "", "name"),
        "score": (1, "", "name"),
        "test images of": (1, "", "name"),
    },
    "05": {
        "setting": (1, "", "name"),
        "method": (-1, "", "name"),
        "minus": (-1, "", "name"),
        "class": (1, "macro F1", ""),
        "device": (1, "", "name"),
    },
    "09": {
        "hostile hospitals": (1, r"mean \(FedAvg\) is ([.\d]+) away", "+"),
        "step times": (2, r"mean \(FedAvg\) is ([.\d]+) away", "+"),
        "direction": (1, r"mean \(FedAvg\) is ([.\d]+) away", "-"),
    },
    "explorer": {
        "class skew: alpha": (-1, r"; balanced accuracy", ""),
        "sharing": (-4, r" (\d+) after", "+"),
        "budget": (1, r"at most (\d+)", "+"),
        "temperature": (1, "", "picture"),
    },
}


def chromium() -> str:
    """Path of the browser; without one the test is skipped, or fails where FEDSSG_BROWSER is `required`."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    try:
        import playwright  # noqa: F401
    except ImportError:
        found = None
    if found:
        return found
    reason = "no browser: needs Chromium (apt-get install chromium) and the package playwright"
    (pytest.fail if os.environ.get("FEDSSG_BROWSER") == "required" else pytest.skip)(reason)


def small(path: Path, folder: Path) -> None:
    """A copy of the notebook with what its explorers need, run with few rounds; nothing of the course is written."""
    notebook = nbformat.read(path, as_version=4)
    wanted = [i for i, cell in enumerate(notebook.cells) if any(call in cell.source for call in CALLS)]
    cells = [notebook.cells[i] for i in needed(notebook.cells, wanted)]
    for cell in cells:
        cell.outputs, cell.execution_count = [], None
    own = {name: value for name, value in SMALL.items() if re.search(rf"^{name}:", cells[0].source, re.M)}
    cells.insert(1, new_code_cell("\n".join(f"{name} = {value}" for name, value in own.items())))
    cells.insert(3, new_code_cell(FEWER if any("methods.LESSON" in cell.source for cell in cells) else ""))
    notebook.cells = cells
    nbformat.write(notebook, folder / path.name)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextmanager
def serving(command: list[str], folder: Path, probe: str):
    """A server as a child process; ready when `probe` answers, ended with everything that it started."""
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, start_new_session=True)
    try:
        for _ in range(10 * PATIENCE):
            try:
                urllib.request.urlopen(probe, timeout=5).close()
                break
            except urllib.error.HTTPError:  # it answers
                break
            except OSError:
                assert process.poll() is None, (folder / "server.log").read_text()[-2000:]
                time.sleep(0.1)
        yield
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium."""
    executable = chromium()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as player:
        started = player.chromium.launch(executable_path=executable, args=FLAGS)
        yield started
        started.close()


@pytest.fixture(scope="module")
def lab(browser, tmp_path_factory):
    """Address of a real JupyterLab on this machine, in a folder with the small copies."""
    folder = tmp_path_factory.mktemp("lab")
    SCREENS.mkdir(exist_ok=True)
    for path in PAGES:
        small(path, folder)
    settings = {
        "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
        "notebook-extension/tracker": {"windowingMode": "none"},
    }
    for name, values in settings.items():
        file = folder / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))
    own = {f"JUPYTER_{name}_DIR": str(folder / name) for name in ("CONFIG", "DATA", "RUNTIME")}
    own |= {f"JUPYTERLAB_{name.upper()}_DIR": str(folder / name) for name in ("settings", "workspaces")}
    own |= {"FEDSSG_DATA": "", "FEDSSG_OUT": str(folder / "out")}
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        "--no-browser",
        "--allow-root",
        "--ip=127.0.0.1",
        f"--port={port}",
        "--ServerApp.port_retries=0",
        f"--IdentityProvider.token={TOKEN}",
        f"--ServerApp.root_dir={folder}",
    ]
    with course.kernel_here(**own), serving(command, folder, f"http://127.0.0.1:{port}/api?token={TOKEN}"):
        yield f"http://127.0.0.1:{port}"


def until(happened, what: str):
    """Poll until `happened()` is true; what it returned."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if answer := happened():
            return answer
        time.sleep(0.05)
    raise AssertionError(f"still not so after {PATIENCE} s: {what}")


LOOK = """box => JSON.stringify([box.querySelector('[role=status]').innerText, box.querySelector('img').src,
    [...box.querySelectorAll('.noUi-handle')].map(handle => handle.getAttribute('aria-valuenow')),
    [...box.querySelectorAll('select')].map(list => list.selectedIndex)])"""  # words, picture and dials, in one question


class Box:
    """One explorer on a page: its dials, its words, its picture."""

    def __init__(self, page, locator):
        self.page, self.at = page, locator
        self.dials = locator.locator(".widget-slider, .widget-dropdown, .widget-select")

    def words(self) -> str:
        return self.at.locator("[role=status]").inner_text().strip()

    def picture(self) -> str:
        return self.at.locator("img").get_attribute("src")

    def pale(self) -> bool:
        return self.at.locator("img.pale").count() > 0

    def dial(self, label: str):
        return next(dial for dial in self.dials.all() if name_of(dial) == label)

    def press(self, dial, keys: int) -> None:
        """Keys on a focused dial: a slider to the right (negative: left), a list opened, down (up) and chosen."""
        slider = dial.locator(".noUi-handle").count() > 0
        dial.locator(".noUi-handle" if slider else "select").first.focus()
        key = (
            ("ArrowRight" if keys > 0 else "ArrowLeft")
            if slider
            else ("ArrowDown" if keys > 0 else "ArrowUp")
        )
        for press in [key] * abs(keys) if slider else ["Space", *[key] * abs(keys), "Enter"]:
            self.page.keyboard.press(press)  # JupyterLab keeps arrow keys from a list that is not opened

    def settle(self) -> None:
        """Wait until the kernel has answered all that was asked: an answer under way would set a dial once more."""
        seen = []

        def quiet() -> bool:
            self.page.wait_for_timeout(150)
            busy = self.page.get_by_text("Python 3 (ipykernel) | Busy").count()
            seen.append((busy, self.at.evaluate(LOOK)))
            return not busy and len(seen) > 4 and len(set(seen[-5:])) == 1

        until(quiet, "nothing changes any more")

    def stands(self, dial) -> str:
        """Where a dial stands."""
        handle = dial.locator(".noUi-handle")
        return handle.get_attribute("aria-valuenow") if handle.count() else chosen(dial)

    def back(self, dial, keys: int, stood: str) -> None:
        """Key by key until the dial stands where it stood: a busy kernel's answer may set it once more meanwhile."""
        if not dial.locator(".noUi-handle").count():
            self.press(dial, keys)
            return

        def there() -> bool:
            if self.stands(dial) == stood:
                self.page.wait_for_timeout(300)
                return self.stands(dial) == stood
            self.press(dial, 1 if float(self.stands(dial)) < float(stood) else -1)
            return False

        until(there, f"{name_of(dial)} stands at {stood} again")

    def type(self, label: str, text: str) -> None:
        """Type a value into the number beside a slider."""
        field = self.dial(label).locator("[contenteditable=true]")
        field.click()
        self.page.keyboard.press("Control+A")
        self.page.keyboard.type(text)
        self.page.keyboard.press("Enter")

    def value(self, label: str) -> str:
        return self.dial(label).locator(".widget-readout").inner_text()

    def shoot(self, name: str) -> None:
        self.at.evaluate("box => box.scrollIntoView()")
        self.page.wait_for_timeout(300)
        self.page.screenshot(path=SCREENS / f"{name}.png")


def name_of(dial) -> str:
    return dial.locator("label").first.inner_text().strip()


def chosen(dial) -> str:
    """The text of a list's chosen entry."""
    return dial.locator("select").evaluate("s => s.selectedOptions[0].text").replace("\xa0", " ")


def number(pattern: str, words: str) -> float:
    found = re.search(pattern, words)
    assert found, f"no {pattern!r} in {words!r}"
    return float(found[1])


@contextmanager
def opened(browser, lab: str, name: str):
    """The page of a notebook in JupyterLab, all cells run, without the file browser, as in class."""
    page = browser.new_page(viewport={"width": 1280, "height": 800})
    page.set_default_timeout(1000 * PATIENCE)
    page.goto(f"{lab}/lab/tree/{name}?token={TOKEN}&reset")
    page.locator(".jp-Notebook .jp-Cell").first.wait_for()
    page.get_by_text("Python 3 (ipykernel) | Idle").wait_for()
    page.keyboard.press("Control+b")
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    try:
        yield page
    except Exception:
        page.screenshot(path=SCREENS / f"failed-{Path(name).stem}.png")
        raise
    finally:
        page.close()
        with urllib.request.urlopen(f"{lab}/api/sessions?token={TOKEN}") as answer:
            sessions = json.load(answer)
        for session in sessions:
            request = urllib.request.Request(
                f"{lab}/api/sessions/{session['id']}?token={TOKEN}", method="DELETE"
            )
            urllib.request.urlopen(request).close()


def finished(page, name: str) -> list[Box]:
    """The page's explorers, once the last cell has run; no cell may have failed."""
    calls = sum(
        cell.source.count(call)
        for cell in nbformat.read(course.LESSONS / name, as_version=4).cells
        for call in CALLS
    )
    errors = page.locator(
        ".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.error'], .jupyter-widgets-error-widget"
    )
    until(
        lambda: errors.count() or page.locator(".explorer img").count() == calls,
        f"{calls} explorers in {name}",
    )
    assert errors.count() == 0, errors.first.inner_text()
    return [Box(page, at) for at in page.locator(".explorer").all()]


def move(box: Box, dial, keys: int, pattern: str, follows: str) -> None:
    """Move a dial, see the picture and the words follow, and move it back."""
    box.settle()
    label, words, picture, stood = name_of(dial), box.words(), box.picture(), box.stands(dial)
    pressed = float("-inf")

    def changed() -> bool:  # a key is lost where the page is busy: whoever sees that presses again
        nonlocal pressed
        if time.monotonic() > pressed + 10 and box.stands(dial) == stood:
            box.press(dial, keys)
            pressed = time.monotonic()
        return box.picture() != picture

    until(changed, f"{label} changes the picture")
    if follows in ("+", "-"):
        before, sign = number(pattern, words), 1 if follows == "+" else -1
        until(
            lambda: sign * (number(pattern, box.words()) - before) > 0, f"{label}: {pattern} goes {follows}"
        )
    elif follows == "name":
        until(lambda: chosen(dial) in box.words(), f"{label}: the words name {chosen(dial)}")
    elif pattern:
        until(lambda: re.search(pattern, box.words()), f"{label}: the words say {pattern}")
    assert not box.pale()
    box.settle()
    box.back(dial, -keys, stood)
    until(lambda: box.words() == words, f"{label} leads back to {words}")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_every_dial(browser, lab, path):
    expected = MOVES.get(path.stem.split("_")[0], {})
    with opened(browser, lab, path.name) as page:
        for i, box in enumerate(finished(page, path.name)):
            box.shoot(f"{path.stem}-{i}")
            for dial in box.dials.all():
                assert dial.locator("[title]").count(), f"{name_of(dial)} has a tooltip"
                chooses = (
                    name_of(dial) == "budget" and path.stem == "explorer"
                )  # among three, typing does nothing
                if dial.locator("[contenteditable=true]").count() and not chooses:
                    nonsense(box, name_of(dial))
                if not box.at.locator("button").count():  # a live run's dials are moved in its own test
                    move(box, dial, *expected.get(name_of(dial), (1, "", "picture")))
            if path.stem.startswith("01"):
                impossible(box)


def nonsense(box: Box, label: str) -> None:
    """A value out of range becomes the nearest possible one, a word is forgotten."""
    before, handle = box.value(label), box.dial(label).locator(".noUi-handle")
    top = handle.get_attribute("aria-valuemax")
    box.type(label, "99999999")
    until(lambda: handle.get_attribute("aria-valuenow") == top, f"{label} stops at {top}")
    box.type(label, "many")
    until(lambda: "many" not in box.value(label), f"{label} forgets a word")
    box.type(label, before)
    until(lambda: box.value(label) == before, f"{label} is {before} again")


def impossible(box: Box) -> None:
    """More hospitals than can all get an image: a sentence, no traceback, and the next move works."""
    box.settle()
    box.type("hospitals", "20")
    box.settle()
    box.press(box.dial("class skew: alpha"), -9)
    until(
        lambda: box.words().startswith("Not possible: a hospital stayed empty") and box.pale(), "a sentence"
    )
    box.shoot("01_impossible")
    box.settle()
    box.press(box.dial("class skew: alpha"), 9)
    until(lambda: "label divergence" in box.words() and not box.pale(), "the next move works")


def test_live_run(browser, lab):
    """Started, stopped half-way, which leaves a result, and started again; the earlier runs stay."""
    path = next(path for path in PAGES if "explore.live(" in path.read_text())
    with opened(browser, lab, path.name) as page:
        box = next(box for box in finished(page, path.name) if box.at.locator("button").count())
        start, stop = box.at.get_by_role("button", name="Start"), box.at.get_by_role("button", name="Stop")
        assert start.get_attribute("title") and stop.get_attribute("title")
        until(lambda: "2 run(s) kept" in box.words() and stop.is_disabled(), "the two runs made before")

        def step() -> tuple[int, int]:
            found = re.search(r"step (\d+) of (\d+)", box.at.inner_text())
            return (int(found[1]), int(found[2])) if found else (0, 0)

        box.type("rounds", "20")
        start.press("Space")
        until(lambda: step()[0] >= 2 and step()[1] == 20, "two rounds of 20")
        assert start.is_disabled()
        picture = box.picture()
        until(lambda: box.picture() != picture, "the curves grow")
        box.shoot("04_live")
        stop.press("Space")
        until(
            lambda: "stopped, and what ran is kept" in box.at.inner_text() and start.is_enabled(),
            "it is stopped",
        )
        ran = step()[0]
        assert 2 <= ran < 20 and stop.is_disabled()
        result = rf"run 3: .*round {ran} of 20, balanced accuracy 0\.\d\d; 3 run\(s\) kept"
        until(lambda: re.search(result, box.words()), "the stopped run's result")

        box.type("rounds", "2")
        box.press(box.dial("local epochs"), 1)
        box.press(box.dial("class skew: alpha"), -1)
        box.press(box.dial("method"), -1)
        start.click()
        until(lambda: "done: step 2 of 2" in box.at.inner_text(), "the second run ends by itself")
        until(
            lambda: (
                box.words().startswith("run 4: local_normalisation, 2 ep., alpha 0.1: round 2 of 2")
                and "4 run(s) kept" in box.words()
            ),
            "the second run's result",
        )


def test_page_without_code_by_voila(browser, lab, tmp_path):
    """What `make explorer` serves: one picture and its dials, no code, and they answer."""
    pytest.importorskip("voila", reason="Voila is not installed: pip install -e '.[explorer]'")
    option = re.search(r"^VOILA = (.*)$", (course.ROOT / "Makefile").read_text(), re.M)[1]
    shutil.copy(course.LESSONS / "explorer.ipynb", tmp_path)
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "voila",
        "explorer.ipynb",
        "--no-browser",
        "--Voila.ip=127.0.0.1",
        f"--port={port}",
        option,
    ]
    with serving(command, tmp_path, f"http://127.0.0.1:{port}/no-such-page"):
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        page.set_default_timeout(1000 * PATIENCE)
        page.goto(f"http://127.0.0.1:{port}/")
        box = Box(page, page.locator(".explorer"))
        until(lambda: page.locator("img").count() == 1 and box.words(), "the page's one picture")
        page.wait_for_timeout(500)
        page.screenshot(path=SCREENS / "voila.png")
        assert "import" not in page.locator("body").inner_text()
        move(box, box.dial("sharing"), *MOVES["explorer"]["sharing"])
        page.close()
