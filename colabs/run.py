"""Runs the notebooks of this folder, each in a Jupyter kernel of its own, and says how long each took.

    python colabs/run.py                            # all of them, in full
    python colabs/run.py explore_schedules --short  # one of them, with the values of SHORT in its forms
    python colabs/run.py --pictures                 # and keep the picture that stands at the top of each
    python colabs/run.py --address https://github.com/OWNER/NAME  # runs nothing: writes where the repository is

Needs the extra `colab`. The notebooks stay as they are: outputs go nowhere, or with ``--out FOLDER`` into copies there.
"""

from __future__ import annotations

import argparse
import base64
import json
import re
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
IMAGES = HERE / "images"
SHORT: dict[str, dict[str, Any]] = {
    "explore_schedules": {"steps": 300},
    "quantize_your_model": {"steps": 12, "cycles": 2, "seeds": 1, "nnx_steps": 8},
    "train_under_a_schedule": {"steps": 50, "cycles": 2},
    "compare_with_aqt": {
        "widths": (4, 2),
        "task": "digits_mlp",
        "static_bits": (8,),
        "low": 7,
        "cycles": 2,
        "steps": 12,
    },
}
"""By notebook, the values of form fields with which the tests run it."""
COLAB = "https://colab.research.google.com/github"


def main() -> int:
    """Run what is asked for; returns the exit code: 1 when a notebook failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(SHORT)}; by default all")
    parser.add_argument("--short", action="store_true", help="as the tests run them")
    parser.add_argument("--pictures", action="store_true", help="write images/NAME.png")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="keep the notebooks with their outputs there")
    parser.add_argument("--address", metavar="URL", help="put the repository's address into badges and install cells")
    arguments = parser.parse_args()
    names = arguments.names or list(SHORT)
    for name in names:
        if name not in SHORT:
            parser.error(f"{name!r} is no notebook; there are {', '.join(SHORT)}")
    if arguments.address is not None:
        try:
            found = {name: addressed(read(name), name, arguments.address) for name in names}
        except ValueError as error:
            parser.error(str(error))
        for name, notebook in found.items():
            write(HERE / f"{name}.ipynb", notebook)
        return 0
    failed = 0
    for name in names:
        notebook = with_values(read(name), SHORT[name]) if arguments.short else read(name)
        start = time.monotonic()
        error = execute(notebook)
        print(f"{name}: {'failed after ' if error else ''}{time.monotonic() - start:.1f} s", flush=True)
        if error:
            failed += 1
            print(error, file=sys.stderr)
        if arguments.out:
            arguments.out.mkdir(parents=True, exist_ok=True)
            write(arguments.out / f"{name}.ipynb", notebook)
        if arguments.pictures and not error:
            IMAGES.mkdir(exist_ok=True)
            (IMAGES / f"{name}.png").write_bytes(picture(notebook))
    return int(failed > 0)


def read(name: str) -> dict[str, Any]:
    """The notebook `name` of this folder."""
    return json.loads((HERE / f"{name}.ipynb").read_text(encoding="utf-8"))


def write(path: Path, notebook: Mapping[str, Any]) -> None:
    """Write a notebook as Jupyter does."""
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def sources(notebook: Mapping[str, Any], kind: str = "code") -> list[str]:
    """The text of its cells of a kind."""
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind]


def with_values(notebook: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The notebook with other values in its forms: ``name = value  # @param …``.

    Raises:
      ValueError: for a name that is not a field of one form exactly.
    """
    left = dict.fromkeys(values, 0)

    def replaced(line: str) -> str:
        field = re.match(r"(\w+) = .*?(\s*# @param\b.*\n?)$", line, re.DOTALL)
        if field is None or field[1] not in values:
            return line
        left[field[1]] += 1
        return f"{field[1]} = {values[field[1]]!r}{field[2]}"

    cells = [{**cell, "source": [replaced(line) for line in cell["source"]]} for cell in notebook["cells"]]
    for name, times in left.items():
        if times != 1:
            raise ValueError(f"{name}: {times} form fields have this name")
    return {**notebook, "cells": cells}


def execute(notebook: dict[str, Any]) -> str:
    """Run all cells in a new kernel, in an empty folder; outputs go into `notebook`. The error, or ""."""
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    node = nbformat.reads(json.dumps(notebook), as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        place: dict[str, Any] = {"metadata": {"path": folder}}
        client = NotebookClient(node, timeout=1800, kernel_name="python3", resources=place)
        try:
            client.execute()
            error = ""
        except CellExecutionError as failure:
            error = str(failure)
    notebook.clear()
    notebook.update(json.loads(nbformat.writes(node)))
    return error


def picture(notebook: Mapping[str, Any]) -> bytes:
    """The PNG that its cell with the tag ``picture`` has drawn."""
    for cell in notebook["cells"]:
        if "picture" in cell["metadata"].get("tags", ()):
            for output in cell["outputs"]:
                if "image/png" in output.get("data", {}):
                    return base64.b64decode(output["data"]["image/png"])
    raise ValueError("no cell with the tag 'picture' has drawn one")


def addressed(notebook: Mapping[str, Any], name: str, address: str) -> dict[str, Any]:
    """The notebook with the address of the repository, on GitHub, in its badge, its picture and its install cell.

    Raises:
      ValueError: for an address of another form.
    """
    found = re.fullmatch(r"https://github\.com/([\w.-]+)/([\w.-]+?)(?:\.git)?/?", address)
    if found is None:
        raise ValueError(f"{address}: must be https://github.com/OWNER/NAME")
    repository = f"{found[1]}/{found[2]}"
    badge = f"{COLAB}/{repository}/blob/main/colabs/{name}.ipynb"
    raw = f"https://raw.githubusercontent.com/{repository}/main/colabs/images/{name}.png"  # Colab finds no other

    def replaced(line: str) -> str:
        line = re.sub(re.escape(f"({COLAB}") + r"[^)]*\)", f"({badge})", line)
        return re.sub(rf"\]\([^)]*images/{name}\.png\)", f"]({raw})", line)

    cells = [{**cell, "source": [replaced(line) for line in cell["source"]]} for cell in notebook["cells"]]
    return with_values({**notebook, "cells": cells}, {"address": f"https://github.com/{repository}"})


if __name__ == "__main__":
    sys.exit(main())
