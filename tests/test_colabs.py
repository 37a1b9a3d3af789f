"""The notebooks of colabs/: executed in a short form, stripped, with an install cell and their picture."""

from __future__ import annotations

import ast
import copy
import importlib.util
import os
import re
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import matplotlib
import nbformat
import pytest

from qtrain import overrides

ROOT = Path(__file__).parents[1]
COLABS = ROOT / "colabs"

specification = importlib.util.spec_from_file_location("colabs_run", COLABS / "run.py")
colabs = importlib.util.module_from_spec(specification)
specification.loader.exec_module(colabs)
NAMES = tuple(colabs.SHORT)


def run_cells(notebook):
    """The names that its cells leave, which are executed here, and so with warnings as errors and no kernel to start.

    Magics are refused if they are reached; the value of a last expression is shown by its `repr`.
    """
    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = {"__name__": "__main__"}
    for index, source in enumerate(colabs.sources(notebook)):
        plain = re.sub(r"^(\s*)%.*$", r"\1raise AssertionError('a magic was reached')", source, flags=re.MULTILINE)
        body = ast.parse(plain).body
        last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
        where = f"cell {index}"
        exec(compile(ast.Module(body, []), where, "exec"), names)
        if last is not None:
            repr(eval(compile(ast.Expression(last.value), where, "eval"), names))
        pyplot.close("all")
    return names


@pytest.fixture
def short(tmp_path, monkeypatch, capsys):
    """Runs a notebook with the values of `SHORT`, and `values`; gives its names, and what it printed."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    jax.config.update("jax_disable_most_optimizations", True)  # of programs that run a few times

    def run(name, **values):
        names = run_cells(colabs.with_values(colabs.read(name), {**colabs.SHORT[name], **values}))
        return names, capsys.readouterr().out

    yield run
    jax.config.update("jax_disable_most_optimizations", False)


def test_explore_schedules(short):
    names, printed = short("explore_schedules", low=4)
    assert names["bits"].min() == 4 and names["bits"].max() == 8 and len(names["bits"]) == 300
    # The sum over the steps that are drawn is the run's cost; the suite holds the chosen schedule.
    assert names["step_cost"].sum(dtype=float) == pytest.approx(names["effective"], rel=1e-6)
    assert names["savings"]["CR"] == pytest.approx(names["saving"]) and 0.25 < names["saving"] < 0.35
    assert len(names["savings"]) == 10 and max(names["savings"], key=names["savings"].get) == "RR"
    # The last line is a command that the program takes, and it means the schedule of the form.
    command = printed.rstrip().splitlines()[-1].split()
    assert command[:2] == ["qtrain", "train"]
    config = overrides.parse("train", _flags(), [flag.replace("configs/", f"{ROOT}/configs/") for flag in command[2:]])
    assert config.train.steps == 300 and config.schedule.low == 4 and config.schedule.profile == "cosine"


def _flags():
    from absl import flags

    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "Folder.", flag_values=values)
    return values


def test_quantize_your_model(short):
    names, printed = short("quantize_your_model")
    assert {name: names["traced"].count(name) for name in names["traced"]} == {
        "logits_at": 2,  # for 32 images, and for the test set
        "gradient_at": 1,
        "train_step": 1,
        "nnx_step": 1,
    }
    assert "Did you mean 'hidden'" in printed and printed.count("100.0 % of") == 2
    errors = [float(value) for value in re.findall(r"relative error ([\d.]+)", printed)]
    cosines = [float(value) for value in re.findall(r"float gradient ([\d.]+)", printed)]
    assert len(errors) == len(cosines) == 7 and errors == sorted(errors, reverse=True) and errors[-1] < 0.02
    assert cosines[0] < 0.8 < 0.99 < cosines[-1]


def test_train_under_a_schedule(short):
    names, printed = short("train_under_a_schedule")
    assert names["summary"]["compilations"] == names["static_summary"]["compilations"] == 1
    assert names["summary"]["steps"] == 50 and "saving" in printed
    assert names["static_summary"]["saving"] == 0 < names["summary"]["saving"] < 0.6
    assert [row["step"] for row in names["rows"]] == [50]


def test_its_config_is_the_shipped_one():
    """As it stands in the notebook, without the values of the short form."""
    names = {}
    for source in colabs.sources(colabs.read("train_under_a_schedule"))[1:3]:
        exec(source, names)
    assert names["config"].to_dict() == overrides.load(f"{COLABS.parent}/configs/digits_cnn_cpt.py").to_dict()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_compare_with_aqt(short):
    try:
        import aqt.jax.v2.aqt_conv_general
        import aqt.jax.v2.config  # noqa: F401
    except Exception as error:  # aqtp 0.9 warns that a coming numpy will break it
        pytest.skip(f"aqt cannot be imported: {error!r}")
    names, printed = short("compare_with_aqt")
    assert set(names["parity"]) == {4, 2}
    assert max(max(row) for row in names["parity"].values()) < 1e-5
    assert "traced 3 times: 2 for AQT, 1 for qtrain" in printed
    theirs, ours = (names["found"][backend, 8][1] for backend in ("aqt", "qtrain"))
    assert len(ours) == 12 and ours[0] == pytest.approx(theirs[0], rel=1e-5)
    assert names["found"]["scheduled"][0]["compilations"] == 1 and names["found"]["scheduled"][0]["saving"] > 0
    assert names["visited"] == [7, 8] and all(len(spent) == 2 for spent in names["seconds"].values())


@pytest.mark.parametrize("name", NAMES)
def test_as_it_lies_in_git(name):
    notebook = colabs.read(name)
    nbformat.validate(notebook, relax_add_props=False)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None, "nbstripout colabs/*.ipynb"
    title, install = notebook["cells"][:2]
    assert title["cell_type"] == "markdown" and "colab-badge.svg)](https://colab.research.google.com/github" in "".join(
        title["source"]
    )
    # Whatever is installed is so in the first code cell alone, and only where qtrain cannot be imported.
    first, *others = colabs.sources(notebook)
    assert first == "".join(install["source"]) and first.startswith("# @title Install")
    assert re.search(
        r'^if .*find_spec\("qtrain"\) is None:\n(    .*\n)*    %pip install -q "qtrain @ git\+', first, re.M
    )
    assert not any(re.search(r"^\s*[%!]", source, re.M) for source in others)
    assert sum("picture" in cell["metadata"].get("tags", ()) for cell in notebook["cells"]) == 1


@pytest.mark.parametrize("name", NAMES)
def test_its_picture_stands_where_a_reader_looks(name):
    png = (COLABS / "images" / f"{name}.png").read_bytes()
    width, height = struct.unpack(">II", png[16:24])
    assert png.startswith(b"\x89PNG\r\n\x1a\n") and 600 <= width <= 1400 and height >= 350 and len(png) < 150_000
    assert re.search(rf"!\[[^\]]{{20,}}\]\([^)]*images/{name}\.png\)", colabs.sources(colabs.read(name), "markdown")[0])
    table = (COLABS / "README.md").read_text()
    assert f"({name}.ipynb)" in table and f"(images/{name}.png)" in table


def test_all_notebooks_are_known():
    assert sorted(path.stem for path in COLABS.glob("*.ipynb")) == sorted(NAMES)
    assert "colabs/README.md" in (ROOT / "README.md").read_text()


def test_links_between_them():
    for name in NAMES:
        for target in re.findall(
            r"\]\(([\w./-]+\.(?:ipynb|md))\)", "".join(colabs.sources(colabs.read(name), "markdown"))
        ):
            assert (COLABS / target).is_file(), (name, target)


def test_other_values_in_the_forms():
    notebook = colabs.read("train_under_a_schedule")
    before = copy.deepcopy(notebook)
    changed = colabs.with_values(notebook, {"steps": 5, "profile": "rex"})
    assert notebook == before
    lines = "".join(colabs.sources(changed)).splitlines()
    assert 'profile = \'rex\'  # @param ["cosine", "linear", "exponential", "rex"]' in lines
    assert 'steps = 5  # @param {type: "integer"}' in lines
    with pytest.raises(ValueError, match="stepz: 0 form fields"):
        colabs.with_values(notebook, {"stepz": 5})


@pytest.mark.parametrize("address", ["https://github.com/some/where", "https://github.com/some/where.git"])
def test_an_address_reaches_badge_picture_and_install_cell(address):
    name = "explore_schedules"
    once = colabs.addressed(colabs.read(name), name, address)
    title, install = ("".join(cell["source"]) for cell in once["cells"][:2])
    assert f"(https://colab.research.google.com/github/some/where/blob/main/colabs/{name}.ipynb)" in title
    assert f"](https://raw.githubusercontent.com/some/where/main/colabs/images/{name}.png)" in title
    assert "address = 'https://github.com/some/where'  # @param" in install
    again = colabs.addressed(once, name, "https://github.com/an/other")
    assert "some/where" not in "".join(map("".join, (cell["source"] for cell in again["cells"])))
    with pytest.raises(ValueError, match="must be https://github"):
        colabs.addressed(once, name, "github.com/some/where")


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_in_full_in_a_kernel(name):
    for package in ("nbclient", "ipykernel"):
        pytest.importorskip(package, reason="the extra 'colab' is not installed")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, str(COLABS / "run.py"), name]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(rf"{name}: [\d.]+ s\n", done.stdout)
