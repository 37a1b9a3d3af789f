"""A point of a sweep as a process: ``python -m qtrain.sweep.worker INDEX DIGEST FOLDER --config FILE ...``.

It is stopped, as by SIGTERM, when its standard input ends, which it does when the sweep that started it is gone.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Sequence

from qtrain import main
from qtrain.errors import Preempted, UsageError, one_line
from qtrain.sweep.expand import resolved


def run(index: int, digest: str, folder: str, arguments: Sequence[str]) -> int:
    """Train point `index` of the sweep that `arguments` name; the exit code of ``qtrain train``, 1 for any failure.

    It is refused unless its config has the `digest` that it had for the sweep: the config file is read again here. The
    last line printed says what failed, as JSON.
    """
    from qtrain.train import train

    try:
        _, _, points = resolved(arguments)
        if index >= len(points) or points[index].digest != digest:
            raise UsageError(f"the config file has changed since the sweep began, and with it point {index}; undo that")
        train(points[index].config, folder, quiet=True)
    except Preempted as stop:
        print(stop, flush=True)
        return main.PREEMPTED
    except Exception as error:
        import traceback

        traceback.print_exc()
        said = {"kind": type(error).__name__, "error": one_line(error)}
        print("\n" + json.dumps(said), file=sys.stderr, flush=True)
        return main.DIVERGED
    return 0


def _watch() -> None:
    # Not sys.stdin: a thread that waits inside it makes the interpreter abort when it ends.
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    # Until the trainer has a handler of its own there is nothing to save.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(main.PREEMPTED))
    # Slurm sends the signal that submitit asks for to every process of a job.
    if hasattr(signal, "SIGUSR2"):  # not on Windows
        signal.signal(signal.SIGUSR2, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    threading.Thread(target=_watch, daemon=True).start()
    sys.exit(run(int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4:]))
