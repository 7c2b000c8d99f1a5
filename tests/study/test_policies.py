"""A synchronous policy remembers the trials that were taken over until it continues them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import optuna

from optuna_nnhp.study.policies.population import PopulationPolicy


def context() -> Any:
    """Return a context of which only the sampler is used before a group starts."""
    unused = dict.fromkeys(
        ("study", "problem", "budget", "finisher", "queue", "recovery", "worker"), None
    )
    source = SimpleNamespace(sampler=optuna.samplers.RandomSampler(0))
    return SimpleNamespace(source=source, wait_for_storage=None, save=None, **unused)


def test_trials_of_one_worker_that_are_taken_over_in_two_parts_are_all_kept() -> None:
    first, second, other = (optuna.trial.create_trial(value=value) for value in (1.0, 2.0, 3.0))
    policy = PopulationPolicy(context())
    policy.restore({"a": [first]})
    policy.restore({"a": [second], "b": [other]})
    assert policy.claimed == {"a": [first, second], "b": [other]}
