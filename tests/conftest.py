"""What the whole suite shares: compiled programs, and a garbage collector that does not walk over them all the time."""

import gc
import shutil
import tempfile

import jax
import pytest
from slow_twins import SLOW_TWINS


def pytest_configure(config):
    """A folder of compiled programs for this process and this session.

    Many tests train the same small network, each with a step function of its own, and compiling takes most of their
    time. Not for the processes that tests start, nor shared between workers: JAX does not write an entry in one go, and
    one that is killed, or merely slower, would leave half of it to be read.
    """
    folder = tempfile.mkdtemp(prefix="qtrain-tests-")
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    # JAX's traces are millions of objects that live long, and by default the collector walks over all of them often.
    gc.set_threshold(100_000, 50, 100)


@pytest.hookimpl(tryfirst=True)  # before ``-m`` deselects
def pytest_collection_modifyitems(config, items):
    """Mark `SLOW_TWINS`; of a whole collection one that is not there is a mistake."""
    found = {item.nodeid.rpartition("tests/")[2]: item for item in items}
    for name in SLOW_TWINS & set(found):
        found[name].add_marker(pytest.mark.slow)
    if config.args == config.getini("testpaths") and (missing := sorted(SLOW_TWINS - set(found))):
        raise pytest.UsageError(f"tests/slow_twins.py: there are no such tests: {', '.join(missing)}")


@pytest.fixture(scope="module", autouse=True)
def _forget_programs():
    """Traces of one file are of no use to the next, and a process that keeps them all grows by gigabytes."""
    yield
    jax.clear_caches()
    gc.collect()
