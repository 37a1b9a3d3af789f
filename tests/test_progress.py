"""The progress line, against a clock that the test moves."""

import io
import re

import jax.numpy as jnp
import numpy as np
import pytest

from qtrain.progress import Progress, duration


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


def make(total, terminal=False, **kwargs):
    clock, stream = Clock(), Terminal() if terminal else io.StringIO()
    return Progress(total, stream=stream, clock=clock, **kwargs), clock, stream


def screen(text):
    """What a terminal shows of `text`, which uses carriage return, erase to the end of the line and newline."""
    shown = [""]
    for part in re.findall(r"\r|\n|\x1b\[K|[^\r\n\x1b]+", text):
        if part == "\n":
            shown.append("")
            column = 0
        elif part == "\r":
            column = 0
        elif part == "\x1b[K":
            shown[-1] = shown[-1][:column]
        else:
            shown[-1] = shown[-1][:column] + part + shown[-1][column + len(part) :] if shown[-1] else part
            column = len(shown[-1])
    return shown


def test_one_line():
    progress, clock, stream = make(5000)
    clock.now += 30  # compilation
    progress.update(1, loss=2.5, bits=(3, 3, 8))
    clock.now += 2
    for step in range(2, 1201):
        progress.update(step, loss=jnp.float32(0.312149), bits=(jnp.float32(5), np.float32(5), 32), accuracy=0.9)
    progress.close()
    first, *_, last = stream.getvalue().splitlines()
    assert first == "step 1/5000  0%  loss 2.5  bits 3/3/8  elapsed 0:30"
    # 1199 steps in 2 s; 3800 left at 599.5 a second
    assert last == (
        "step 1200/5000  24%  loss 0.3121  bits 5/5/float  accuracy 0.9  600 steps/s  ETA 0:06  elapsed 0:32"
    )


@pytest.mark.parametrize(
    ("bits", "shown"),
    [
        ((3, 4, 8), "3/4/8"),
        ((23, 24, 32), "23/float/float"),
        ((None, 8, None), "float/8/float"),
        ((jnp.float32(3), np.int32(2), 7.5), "3/2/7.5"),
    ],
)
def test_bits(bits, shown):
    progress, _, stream = make(10)
    progress.update(1, bits=bits)
    assert f"  bits {shown}  " in stream.getvalue()


def test_the_rate_leaves_out_compilation_and_the_eta_survives_a_resume():
    whole, clock, _ = make(1000)
    clock.now += 50
    whole.update(1)
    clock.now += 10
    whole.update(101)
    assert whole.steps_per_second == 10 and whole.elapsed == 60

    resumed, clock, stream = make(1000, start_step=500, elapsed_before=100.0)
    assert resumed.steps_per_second is None and resumed.elapsed == 100
    clock.now += 50
    resumed.update(501)
    assert resumed.steps_per_second is None and "ETA" not in stream.getvalue()
    clock.now += 10
    resumed.update(601)
    assert resumed.steps_per_second == 10 and resumed.elapsed == 160
    resumed.close()
    assert stream.getvalue().splitlines()[-1] == "step 601/1000  60%  10 steps/s  ETA 0:40  elapsed 2:40"


def test_plain_lines_come_at_tenths_and_at_intervals():
    progress, clock, stream = make(1000)
    for step in range(1, 1001):
        clock.now += 0.01
        progress.update(step)
    progress.close()
    steps = [int(re.match(r"step (\d+)/", line)[1]) for line in stream.getvalue().splitlines()]
    assert steps == [1, *range(100, 1001, 100)]
    assert "\r" not in stream.getvalue() and "\x1b" not in stream.getvalue()

    progress, clock, stream = make(10**6)
    times = []
    for step in range(1, 20_001):  # 10 s at first, then a twentieth of the time spent
        clock.now += 0.5
        if progress.update(step):
            times.append(progress.elapsed)
    gaps = np.diff(times)
    assert np.all(gaps[:10] == 10) and np.all(gaps >= 10)
    assert np.all(gaps <= np.maximum(10, 0.05 * np.array(times[1:])) + 0.5)
    assert 80 < len(times) < 110


def test_the_last_step_is_shown_wherever_the_run_stops():
    progress, clock, stream = make(1000)
    for step in range(1, 38):
        clock.now += 0.001
        progress.update(step, loss=step)
    progress.close()
    progress.close()
    assert [line.split()[1] for line in stream.getvalue().splitlines()] == ["1/1000", "37/1000"]
    silent, _, stream = make(1000)
    silent.close()
    assert stream.getvalue() == ""


def test_a_terminal_has_one_line(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    progress, clock, stream = make(1000, terminal=True)
    drawn = 0
    for step in range(1, 1000):
        clock.now += 0.01
        drawn += progress.update(step, loss="x" * (1000 - step if step < 100 else 1))
    assert drawn == pytest.approx(9.99 / 0.25, abs=3)
    assert len(screen(stream.getvalue())) == 1
    progress.update(1000, loss="x")
    progress.close()
    assert screen(stream.getvalue()) == ["step 1000/1000  100%  loss x  100 steps/s  ETA 0:00  elapsed 0:10", ""]


def test_a_terminals_line_does_not_wrap(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    progress, _, stream = make(10, terminal=True)
    progress.update(1, loss=0.5, note="y" * 100)
    assert len(screen(stream.getvalue())[0]) == 39


def test_switched_off_fetches_nothing():
    class Unfetched:
        def __float__(self):
            raise AssertionError("fetched")

    progress, clock, stream = make(100, enabled=False)
    for step in range(1, 101):
        clock.now += 1
        assert not progress.update(step, loss=Unfetched(), bits=(Unfetched(),) * 3)
    progress.close()
    assert stream.getvalue() == "" and progress.steps_per_second == 1 and progress.elapsed == 100

    progress, clock, stream = make(100)
    progress.update(1)
    progress.update(2, loss=Unfetched())  # not due yet


def test_stderr_by_default(capsys):
    with Progress(2) as progress:
        progress.update(1)
    output = capsys.readouterr()
    assert output.out == "" and output.err.startswith("step 1/2  50%")


def test_nothing_to_do():
    progress, _, stream = make(0)
    progress.update(0)
    progress.close()
    assert stream.getvalue() == "step 0/0  100%  elapsed 0:00\n"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (59.6, "1:00"), (65, "1:05"), (3599.4, "59:59"), (3600, "1:00:00"), (200_000, "2d 7:33:20")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text
