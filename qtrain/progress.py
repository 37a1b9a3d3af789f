"""What a run shows while it runs: one moving line on a terminal, a few plain lines elsewhere."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, TextIO

_REDRAW_SECONDS = 0.25  # on a terminal
_LINE_SECONDS = 10.0  # elsewhere, at least; see `Progress`
_LINE_SHARE = 0.05
_CLEAR = "\r\x1b[K"


class Progress:
    """Shows step, percent, loss, bits, rate, time left and time spent.

    ``step 1200/5000  24%  loss 0.3121  bits 3/3/8  412 steps/s  ETA 0:09  elapsed 0:04``

    On a terminal one line is redrawn at most four times a second. Elsewhere (a log file, CI) there is a plain line for
    the first update, the last, every tenth of the steps, and whenever 10 seconds or a twentieth of the time spent,
    whichever is longer, have passed, so that a log of a long run stays short.

    The rate is that of this process, from the first update on, so that the compilation inside the first step does not
    count: ``(step - first step) / (now - time of the first update)``. The time left is the steps left divided by it,
    and so is right after a resume too; the time spent includes `elapsed_before`.

    Args:
      total_steps: where the run ends.
      start_step: where this process begins, the step of the restored checkpoint or 0.
      stream: where to write; stderr by default.
      elapsed_before: seconds that earlier processes spent on this run.
      enabled: False shows nothing and converts nothing; `elapsed` and `steps_per_second` still work.
      clock: seconds, monotonic.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        *,
        stream: TextIO | None = None,
        elapsed_before: float = 0.0,
        enabled: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._total, self._step = total_steps, start_step
        self._stream = sys.stderr if stream is None else stream
        self._terminal = bool(getattr(self._stream, "isatty", lambda: False)())
        self._enabled, self._clock = enabled, clock
        self._started, self._elapsed_before = clock(), elapsed_before
        self._first: tuple[int, float] | None = None  # step and time of the first update
        self._latest: dict[str, Any] = {}
        self._drawn_at = self._drawn_step = -1.0
        self._line = ""  # what stands on the terminal now

    @property
    def elapsed(self) -> float:
        """Seconds this run has taken, earlier processes included."""
        return self._elapsed_before + self._clock() - self._started

    @property
    def steps_per_second(self) -> float | None:
        """The rate of this process without its first step, or None before the second update."""
        if self._first is None or self._step <= self._first[0]:
            return None
        return (self._step - self._first[0]) / max(self._clock() - self._first[1], 1e-9)

    def update(self, step: int, *, loss: Any = None, bits: Sequence[Any] | None = None, **extra: Any) -> bool:
        """Say that `step` steps are complete; draws if it is time to, and returns whether it did.

        Args:
          step: completed steps.
          loss: a number or a scalar array; it is fetched from the device only when a line is drawn.
          bits: of weights, activations and gradients, numbers or scalar arrays; 24 and more, and None, are float.
          **extra: further numbers or strings to show, by name.
        """
        now = self._clock()
        previous, self._step = self._step, step
        self._latest = {"loss": loss, "bits": bits, **extra}
        first = self._first is None
        if self._first is None:
            self._first = (step, now)
        if not self._enabled:
            return False
        since = now - self._drawn_at
        if self._terminal:
            due = since >= _REDRAW_SECONDS
        else:
            tenth = self._total > 0 and 10 * step // self._total > 10 * previous // self._total
            due = tenth or since >= max(_LINE_SECONDS, _LINE_SHARE * self.elapsed)
        if first or due or step >= self._total:
            self._draw(now)
            return True
        return False

    def close(self) -> None:
        """Show the last update if it was not, and leave the cursor on a new line."""
        if self._enabled and self._first is not None and self._drawn_step != self._step:
            self._draw(self._clock())
        if self._line:
            self._stream.write("\n")
            self._stream.flush()
        self._line = ""

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    def _draw(self, now: float) -> None:
        self._drawn_at, self._drawn_step = now, self._step
        line = self._text()
        if self._terminal:
            # One column short of the width: some terminals wrap on the last column, and \r would then not go back.
            self._line = line[: shutil.get_terminal_size().columns - 1]
            self._stream.write(_CLEAR + self._line)
        else:
            self._stream.write(line + "\n")
        self._stream.flush()

    def _text(self) -> str:
        percent = 100 * self._step // self._total if self._total > 0 else 100
        fields = [f"step {self._step}/{self._total}  {percent}%"]
        for name, value in self._latest.items():
            if value is None:
                continue
            if name == "bits":
                fields.append("bits " + "/".join(_bits(width) for width in value))
            else:
                fields.append(f"{name} {value if isinstance(value, str) else format(float(value), '.4g')}")
        rate = self.steps_per_second
        if rate is not None:
            fields.append(f"{rate:.3g} steps/s" if rate < 100 else f"{rate:.0f} steps/s")
            fields.append(f"ETA {duration(max(self._total - self._step, 0) / rate)}")
        fields.append(f"elapsed {duration(self.elapsed)}")
        return "  ".join(fields)


def duration(seconds: float) -> str:
    """Seconds as ``m:ss``, ``h:mm:ss`` or ``2d 3:04:05``, rounded to the second.

    >>> duration(65), duration(3600), duration(200_000)
    ('1:05', '1:00:00', '2d 7:33:20')
    """
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if not hours:
        return f"{minute}:{second:02}"
    return (f"{days}d " if days else "") + f"{hour}:{minute:02}:{second:02}"


def _bits(width: Any) -> str:
    """A width as a whole number where it is one; from 24 on a tensor is left as it is."""
    if width is None or float(width) >= 24:
        return "float"
    return format(float(width), "g")
