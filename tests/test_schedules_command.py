"""`qtrain schedules`, its table and its pictures."""

import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

from qtrain import schedules as S
from qtrain.errors import UsageError
from qtrain.schedules.command import run
from qtrain.schedules.picture import _corners

NAMES = list(S.SUITE)


def size_of_png(path):
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    return int.from_bytes(data[16:20]), int.from_bytes(data[20:24])


def test_table_says_what_each_saves():
    text = S.suite_table(3, 8, 8, 64_000, backward_bits=8)
    rows = {line.split()[0]: line for line in text.splitlines() if line.split() and line.split()[0] in NAMES}
    assert list(rows) == NAMES
    for name, s in S.suite(3, 8, 8, 64_000).items():
        cells = re.split(r"\s{2,}", rows[name])
        pattern = s.pattern + (f", {s.reflection}" if name in ("ETV", "ETH", "RTV", "RTH") else "")
        group = next(g for g, names in S.GROUPS.items() if name in names).removesuffix("_saving")
        mean, saved = S.evaluate(s, 64_000).mean(dtype=float), S.saving(s, 8, 8, 64_000)
        assert cells == [name, s.profile, pattern, f"{mean:.2f}", f"{saved:.1%}", group]
    assert "8 cycles of 8001 steps in 64000 steps" in text and "gradients at 8 bits" in text
    assert all(len(line) < 130 and line == line.rstrip() for line in text.splitlines())


def test_command_prints_the_table_and_draws(tmp_path, capsys):
    picture = tmp_path / "s.png"
    flags = ["--low", "3", "--high=6", "--cycles", "2", "--steps", "500", "--grads", "8", "--plot", str(picture)]
    assert run(flags) == 0
    out = capsys.readouterr().out
    assert out.startswith(S.suite_table(3, 6, 2, 500, 8)) and str(picture) in out
    width, height = size_of_png(picture)
    assert width > 1000 and height > 400


def test_gradients_default_to_high(capsys):
    assert run(["--low", "3", "--high", "6", "--steps", "500"]) == 0
    assert capsys.readouterr().out == S.suite_table(3, 6, 8, 500, 6) + "\n"


def test_help_returns_zero(capsys):
    assert run(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(flag in out for flag in ("--low", "--high", "--cycles", "--steps", "--grads", "--plot"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--low, --high"),
        (["--low", "3"], "--high"),
        (["--low", "four", "--high", "8"], "--low.*'four'"),
        (["--low", "4.5", "--high", "8"], "--low.*'4.5'"),
        (["--low", "0", "--high", "8"], "low=0"),
        (["--low", "9", "--high", "8"], "low=9: must not be above high=8"),
        (["--low", "3", "--high", "8", "--cycles", "0"], "cycles=0"),
        (["--low", "3", "--high", "8", "--cycles", "9", "--steps", "8"], "cycles=9.*total_steps=8"),
        (["--low", "3", "--high", "8", "--steps", "0"], "total_steps=0"),
        (["--low", "3", "--high", "8", "--grads", "0"], "backward_bits=0"),
        (["--low", "3", "--high", "8", "--cycels", "4"], "--cycels: no such flag.*Did you mean '--cycles'"),
        (["--low", "3", "--high", "8", "--cyc", "4"], "--cyc: no such flag"),
        (["--low", "3", "--high", "8", "extra"], "extra: no such flag"),
        (["--low", "3", "--high", "8", "--plot"], "--plot"),
        (
            ["--low", "3", "--high", "8", "--steps", "99", "--plot", "no/such/folder/s.png"],
            "folder no/such/folder does not",
        ),
        (["--low", "3", "--high", "8", "--steps", "99", "--plot", "s.pgn"], "'pgn'.*png, pdf, svg.*Did you mean 'png'"),
        (["--low", "3", "--high", "8", "--steps", "99", "--plot", "s"], "png, pdf, svg"),
        (["--low", "3", "--high", "8", "--steps", "99", "--plot", "/dev/full/s.png"], "cannot be written"),
    ],
)
def test_mistakes_are_one_line_and_print_nothing(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as caught:
        run(argv)
    assert re.search(message, str(caught.value)), str(caught.value)
    assert "\n" not in str(caught.value)
    assert capsys.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())


def test_a_picture_that_cannot_be_written(tmp_path):
    folder = tmp_path / "s.png"
    folder.mkdir()
    with pytest.raises(UsageError, match="is a folder"):
        S.draw({"a": 4}, 10, folder)
    if pathlib.Path("/dev/full").exists():  # opens, and refuses every byte
        link = tmp_path / "full.png"
        link.symlink_to("/dev/full")
        with pytest.raises(UsageError, match=r"cannot be written \(No space"):
            S.draw({"a": 4}, 10, link)
    with pytest.raises(UsageError, match="none to draw"):
        S.draw({}, 10, tmp_path / "t.png")
    with pytest.raises(UsageError, match="'x'"):
        S.draw({"a": "x"}, 10, tmp_path / "t.png")
    with pytest.raises(UsageError, match="path=3"):
        S.draw({"a": 4}, 10, 3)


@pytest.mark.parametrize(("count", "ending"), [(1, "png"), (3, "svg"), (6, "PDF")])
def test_draws_any_schedules(count, ending, tmp_path):
    path = tmp_path / f"some.{ending}"
    schedules = {f"from {i}": S.delayed(10 * i, 4) for i in range(count)}
    assert S.draw(schedules, 100, path) == path
    assert path.stat().st_size > 2000


def test_corners_are_where_the_bits_change():
    bits = np.array([3, 3, 4, 4, 4, 8, 3], np.float32)
    steps, values = _corners(bits)
    assert steps.tolist() == [0, 2, 5, 6, 7] and values.tolist() == [3, 4, 8, 3, 3]


def test_matplotlib_is_loaded_to_draw_only_and_pyplot_never(tmp_path):
    code = (
        "import sys\n"
        "from qtrain.schedules.command import run\n"
        "run(['--low', '3', '--high', '4', '--steps', '50'])\n"
        "assert 'matplotlib' not in sys.modules\n"
        f"run(['--low', '3', '--high', '4', '--steps', '50', '--plot', {str(tmp_path / 's.png')!r}])\n"
        "assert 'matplotlib' in sys.modules and 'matplotlib.pyplot' not in sys.modules\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
