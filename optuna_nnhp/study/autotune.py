"""Measure how many trials to train at once, for each kind of network on each machine."""

from __future__ import annotations

from collections.abc import Callable
import hashlib
import json
import math
import os
from pathlib import Path
import tempfile
import time
from typing import NamedTuple

import optuna
import torch

from optuna_nnhp.engine.library import available_threads
from optuna_nnhp.study.problem import Problem
from optuna_nnhp.training.cohort import Cohort
from optuna_nnhp.training.cohort import Member
from optuna_nnhp.training.cohort import run_to_end

_logger = optuna.logging.get_logger(f"optuna.{__name__}")

MEASUREMENT = 5  # version of the measurement; those of other versions are not used
N_PROBES, PROBE_SECONDS = 2, 0.01  # of each size, and how long each takes at least: seconds
STEP_PROBE_SECONDS = 0.3  # of a budget in seconds: seconds
MIN_GAIN = 1.1  # a larger stack must be faster by this factor, per network, than the smaller one
# The engine's threads are kept busy by so many members each, some of which leave at every rung;
# more of them are no faster where a step is long.
MEMBERS_PER_THREAD = 4
SLOW_STEP = 2e-3  # seconds: the engine's throughput is known from one member with a longer step
WARM_UP = 3  # steps before the first probe of compiled code
SIZE_FACTOR = 4  # from one size that is tried to the next
MAX_STEP_SECONDS = 0.1  # seconds: a stack whose step is expected to take longer is not tried

_known: dict[str, Throughput] = {}


class Throughput(NamedTuple):
    """What was measured of one kind of network.

    Args:
        size:
            The smallest number of trials whose stack is about as fast, per trial, as larger ones.
        round:
            Seconds that a trial's round takes in it; of a `measure_seconds_per_step`, its step.
    """

    size: int
    round: float


def measure_throughput(problem: Problem, leader: Member, most: int) -> Throughput:
    """Measure the best cohort size, at most ``most``, for trials like one, and its speed.

    It is measured once and stored in a file beside the user's other caches, so that the same seed
    gives the same study on one machine.
    """
    found = _known_or_measured(
        (
            problem.signature(leader),
            problem.uses_compiled_engine(),
            problem.description["fingerprint"],
            str(problem.device),
            problem.compile,
        ),
        lambda: _measure(lambda k: problem.cohort(_copy_leader(leader, k)), most),
    )
    return found._replace(size=min(most, found.size))


def measure_seconds_per_step(shape: str, make: Callable[[], Cohort]) -> float:
    """Measure the seconds of one trial's step, once for each shape.

    Args:
        shape:
            What the seconds depend on.
        make:
            Makes a cohort of one.
    """
    found = _known_or_measured(
        (shape,), lambda: Throughput(1, seconds_per_step(make(), STEP_PROBE_SECONDS))
    )
    return found.round


def _known_or_measured(kind: tuple[object, ...], measure: Callable[[], Throughput]) -> Throughput:
    """Return what this process or the cache's file has of a kind of network, or measure it."""
    parts = (torch.__version__, torch.get_num_threads(), MEASUREMENT, *kind)
    key = hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()
    if key not in _known:
        _known.update(_read_cache())
    if key not in _known:
        _known[key] = measure()
        _write_cache({**_read_cache(), key: _known[key]})
    return _known[key]


def clear_autotune_cache() -> None:
    """Remove the measured cohort sizes from this process; their file stays.

    Call it after a change of ``XDG_CACHE_HOME``, where that file lies, to measure again.

    Example:
        >>> clear_autotune_cache()
    """
    _known.clear()


def _copy_leader(leader: Member, k: int) -> list[Member]:
    """Copy a member k times, with a budget that outlasts the measurement."""
    params = leader.params | {"epochs": 1 + N_PROBES, "iterations": 0}
    return [Member(number=i, seed=i, params=params) for i in range(k)]


def _measure(make: Callable[[int], Cohort], most: int) -> Throughput:
    """Measure larger and larger stacks while the throughput grows."""
    cohort = make(1)
    per_round, best, fastest = cohort.batches.per_round, 1, seconds_per_step(cohort)
    k = min(most, MEMBERS_PER_THREAD * available_threads()) if cohort.compiled_mlp else 1
    if k > 1 and fastest > SLOW_STEP:
        return Throughput(k, fastest * per_round)
    if k > 1:
        best, fastest = k, seconds_per_step(make(k)) / k
    while k < most and fastest * min(SIZE_FACTOR * k, most) < MAX_STEP_SECONDS:
        k = min(SIZE_FACTOR * k, most)
        each = seconds_per_step(make(k)) / k
        if each * MIN_GAIN > fastest:
            break
        best, fastest = k, each
    _logger.debug(f"Cohorts of {best}: {1e6 * fastest:.0f} us a network and step.")
    return Throughput(best, fastest * per_round)


def seconds_per_step(cohort: Cohort, probe: float = PROBE_SECONDS) -> float:
    """Return the seconds of a cohort's step, the faster of two probes, which train the cohort."""
    fastest = math.inf
    if cohort.task.compile:  # the first steps compile the code
        asked_for = iter(range(WARM_UP + 1))
        next(run_to_end([cohort], lambda: next(asked_for, None) is None), None)
    for _ in range(N_PROBES):
        before, asked = sum(cohort.iterations), list[float]()

        def enough() -> bool:  # at least one step is done
            asked.append(time.perf_counter())  # noqa: B023
            return len(asked) > 1 and asked[-1] - asked[0] > probe  # noqa: B023

        next(run_to_end([cohort], enough), None)
        seconds = time.perf_counter() - asked[0]  # without the draws for a whole round
        steps = (sum(cohort.iterations) - before) / len(cohort.members)
        fastest = min(fastest, seconds / steps)
        if seconds > max(MAX_STEP_SECONDS, 2 * probe):
            break
    return fastest


def _cache_path() -> Path:
    """Return the path of the cache's file; raise an OSError if there is no home folder."""
    cache = os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(cache or Path.home() / ".cache") / "optuna_nnhp" / "cohort_sizes.json"
    except RuntimeError as error:
        raise OSError(str(error)) from error


def _read_cache() -> dict[str, Throughput]:
    try:
        known = json.loads(_cache_path().read_text())
        return {str(key): Throughput(int(size), float(t)) for key, (size, t) in known.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError, TypeError) as error:
        _logger.debug(f"The measured cohort sizes could not be read: {error}")
        return {}


def _write_cache(sizes: dict[str, Throughput]) -> None:
    """Write all measurements atomically; skip this if the folder is not writable."""
    try:
        path = _cache_path()
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(sizes, file)
        Path(file.name).replace(path)
    except OSError as error:
        _logger.debug(f"The measured cohort sizes could not be written: {error}")
