"""Describe where trials are trained: versions, processor, threads, engine."""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
import platform

import numpy as np
import optuna
from optuna import Study
from optuna import Trial
from optuna.trial import FrozenTrial
import torch

from optuna_nnhp.engine.library import available_threads
from optuna_nnhp.storages.buffered import BufferedStorage
from optuna_nnhp.storages.operations import WORKER
from optuna_nnhp.study._optuna_internals import storage_of
from optuna_nnhp.study.problem import Problem
from optuna_nnhp.version import __version__

# Attributes of a trial: the key of its environment, and the keys of those before it was taken
# over. A study has each environment as the attribute "environment:KEY".
ENVIRONMENT, EARLIER_ENVIRONMENTS = "environment", "earlier_environments"
SEED = "seed"  # attribute of a study, and of a trial whose seed differs from its study's
COMPILED, BY_TORCH, BY_COMPILER = "compiled", "torch", "torch.compile"  # engines

Environment = dict[str, str | int]


def describe_environment(problem: Problem) -> Environment:
    """Describe what results depend on besides data, parameters and seeds.

    The description has no names of machines or users, and no paths.

    Args:
        problem:
            What is tuned.

    Returns:
        Versions, processor, device, threads and engine.
    """
    device = problem.device
    is_gpu = device.type == "cuda"
    return {
        **_process_environment(),
        "device": f"cuda: {torch.cuda.get_device_name(device)}" if is_gpu else str(device),
        "threads": available_threads(),
        "engine": _engine_name(problem),
    }


def environment_key(environment: Environment) -> str:
    """Return a short name of an environment: eight hexadecimal digits.

    Example:
        >>> environment_key({"torch": "2.13.0"}) == environment_key({"torch": "2.12.0"})
        False
    """
    text = json.dumps(environment, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


def record_environment(study: Study, problem: Problem) -> str:
    """Store this environment in the study, and return its key.

    Each environment is one attribute, so workers in different environments do not conflict.

    Args:
        study:
            The opened study.
        problem:
            What is tuned, on the device where this process trains it.

    Returns:
        The environment's key.

    Example:
        >>> from optuna_nnhp.templates import DNNTemplate
        >>> study = optuna.create_study()
        >>> key = record_environment(study, DNNTemplate([[1.0], [2.0]] * 5, ["no", "yes"] * 5))
        >>> study.user_attrs[f"environment:{key}"]["optuna"] == optuna.__version__
        True
    """
    environment = describe_environment(problem)
    key, known = environment_key(environment), study.user_attrs
    if f"{ENVIRONMENT}:{key}" not in known:
        study.set_user_attr(f"{ENVIRONMENT}:{key}", environment)
    storage = storage_of(study)
    if isinstance(storage, BufferedStorage) and WORKER in storage.trial_attrs:  # of one study
        is_other_seed = known.get(SEED, problem.seed) != problem.seed
        storage.set_trial_attr(ENVIRONMENT, key)
        storage.set_trial_attr(SEED, problem.seed if is_other_seed else None)
    return key


def record_earlier_environment(trial: Trial, before: FrozenTrial) -> None:
    """Store in a trial the keys of the environments before this worker took it over.

    Args:
        trial:
            The trial, which this worker trains now.
        before:
            The same trial when it was taken over.

    Example:
        >>> study = optuna.create_study()
        >>> trial, attributes = study.ask(), {"environment": "1a2b3c4d"}
        >>> record_earlier_environment(
        ...     trial, optuna.trial.create_trial(value=1.0, user_attrs=attributes)
        ... )
        >>> trial.user_attrs
        {'earlier_environments': ['1a2b3c4d']}
    """
    known = [before.user_attrs.get(ENVIRONMENT), *before.user_attrs.get(EARLIER_ENVIRONMENTS, [])]
    here = trial.user_attrs.get(ENVIRONMENT)
    if earlier := [key for key in dict.fromkeys(known) if key and key != here]:
        trial.set_user_attr(EARLIER_ENVIRONMENTS, earlier)


def trial_environments(study: Study, trial: FrozenTrial) -> list[Environment]:
    """Return the environments of a trial, the last one first; an empty list if unknown.

    Args:
        study:
            The trial's study.
        trial:
            The trial.

    Example:
        >>> study = optuna.create_study()
        >>> study.set_user_attr("environment:1a2b3c4d", {"torch": "2.12.0"})
        >>> attributes = {"environment": "1a2b3c4d"}
        >>> study.add_trial(optuna.trial.create_trial(value=1.0, user_attrs=attributes))
        >>> trial_environments(study, study.best_trial)
        [{'torch': '2.12.0'}]
    """
    known, attributes = study.user_attrs, trial.user_attrs
    keys = dict.fromkeys([attributes.get(ENVIRONMENT), *attributes.get(EARLIER_ENVIRONMENTS, [])])
    found = [known.get(f"{ENVIRONMENT}:{key}") for key in keys]
    return [environment for environment in found if environment]


def differences(then: Environment, now: Environment) -> list[str]:
    """Return the differences between two environments, as one text each.

    Args:
        then:
            The environment of the first training.
        now:
            The environment of the second training.

    Example:
        >>> differences({"torch": "2.12.0", "threads": 2}, {"torch": "2.13.0", "threads": 2})
        ['torch 2.12.0 then, 2.13.0 now']
    """
    return [
        f"{name} {then.get(name, 'unknown')} then, {now.get(name, 'unknown')} now"
        for name in dict.fromkeys([*now, *then])
        if then.get(name) != now.get(name)
    ]


@functools.cache
def _process_environment() -> Environment:
    """Return the part that does not change within a process."""
    return {
        "optuna_nnhp": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "optuna": optuna.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_model(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }


def _cpu_model() -> str:
    """Return the processor's model, or its architecture if the model is unknown."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _engine_name(problem: Problem) -> str:
    """Return which engine trains the networks."""
    if problem.uses_compiled_engine():
        return COMPILED
    return BY_COMPILER if problem.compile else BY_TORCH
