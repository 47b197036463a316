"""Run committed notebooks again, in place: python .ci/refresh.py 03 A1 (without a number: all lessons)."""

from __future__ import annotations

import base64
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from fedssg_helpers import course

KERNEL = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}


def refresh(paths: list[Path]) -> None:
    """Execute the lessons (built-in data, own defaults); rewrite them, with headline pictures."""
    # Results are cached in a fresh folder: nothing old is shown. A lesson that fails is left untouched.
    with tempfile.TemporaryDirectory() as folder, course.kernel_here(FEDSSG_OUT=folder, FEDSSG_DATA=""):
        for path in paths:
            course.execute(path, Path(folder, path.name), {}, path.stem)
            notebook = stripped(course.read(Path(folder, path.name)))
            course.write(notebook, path)
            (path.parent / "images").mkdir(exist_ok=True)
            if png := course.headline(notebook):
                (path.parent / "images" / f"{path.stem}.png").write_bytes(base64.b64decode(png))


def stripped(notebook):
    """The executed notebook without what changes from run to run: widgets, times, stderr, versions."""
    language = notebook.metadata.get("language_info", {"name": "python"})
    language.pop("version", None)
    notebook.metadata = {"kernelspec": KERNEL, "language_info": language}
    for cell in notebook.cells:
        for name in ("papermill", "execution", "ExecuteTime"):
            cell.metadata.pop(name, None)
        if cell.cell_type == "code":
            kept = [output for output in cell.outputs if output.get("name") != "stderr"]
            cell.outputs = [output for output in kept if "widget" not in "".join(output.get("data", ""))]
    return notebook


if __name__ == "__main__":
    try:
        refresh(course.lessons(only=sys.argv[1:]))
    except course.CourseError as error:
        sys.exit(f"error: {error}")
