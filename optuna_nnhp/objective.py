"""Plain Optuna: the same networks and space as an objective function."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
import threading
from typing import Any
from typing import Literal
from weakref import WeakKeyDictionary

import optuna
from optuna import Study
from optuna import Trial
from optuna.storages import BaseStorage
from optuna.trial import TrialState
from torch import nn

from optuna_nnhp.engine.threads import single_threaded_blas
from optuna_nnhp.inspect.result import Result
from optuna_nnhp.study.environment import ENVIRONMENT
from optuna_nnhp.study.environment import record_environment
from optuna_nnhp.study.outcomes import TrialOutcome
from optuna_nnhp.study.running_trial import RunningTrial
from optuna_nnhp.study.running_trial import suggest
from optuna_nnhp.templates import make_problem
from optuna_nnhp.training.best_weights import BestWeights
from optuna_nnhp.training.retrain import evaluate_best
from optuna_nnhp.training.run_to_end import run_to_end

Direction = Literal["maximize", "minimize"]
Kept = WeakKeyDictionary[BaseStorage, dict[int, tuple[float, BestWeights]]]


class Objective:
    """An objective function for `optuna.Study.optimize`.

    Each trial is a cohort of one: the same space, networks and training as in `optimize`, one
    after the other, with whatever sampler, pruner, storage, callbacks and ``n_jobs`` the study
    has. A pruner is asked after every evaluation. `defaults` is the configuration
    that `optimize` would try first: ``study.enqueue_trial(objective.defaults)``.

    Args:
        template:
            As in `optimize`, like all the others.
        X:
            The table.
        y:
            What to predict.
        network:
            A function of your own from parameters to a network, instead of ``template``.
        options:
            Any of ``target``, ``task``, ``validation``, ``metric``, ``direction``, ``space``,
            ``fixed``, ``seed``, ``device`` and ``compile``. The sampler has its own seed.

    Attributes:
        direction: ``"maximize"`` or ``"minimize"``: what to create the study with.
        space: What is tuned.
        defaults: The catalogue's default configuration, as far as it lies in the space.

    Shape:
        - X: ``(rows, columns)``; y: ``(rows,)``.

    Raises:
        ValueError: If anything in the data or the arguments makes no sense.
        optuna.TrialPruned: When called, if the study's pruner ends the trial.

    Example:
        >>> from sklearn.datasets import load_iris
        >>> objective = Objective("dnn", *load_iris(return_X_y=True), fixed={"epochs": 5})
        >>> study = optuna.create_study(direction=objective.direction)
        >>> study.optimize(objective, n_trials=2)
        >>> objective.result(study).predict([[5.1, 3.5, 1.4, 0.2]]).shape
        (1,)
    """

    def __init__(
        self,
        template: str = "dnn",
        X: Any = None,
        y: Any = None,
        *,
        network: Callable[[Mapping[str, Any]], nn.Module] | None = None,
        **options: Any,
    ) -> None:
        self._problem = make_problem(template, network, X, y=y, **options)
        self.direction: Direction = "maximize" if self._problem.maximize else "minimize"
        self.space = dict(self._problem.space)
        self.defaults = self._problem.defaults()
        self._lock = threading.Lock()
        # Of each study the best so far: by its storage, since names may be the same in others.
        self._kept: Kept = WeakKeyDictionary()

    def __call__(self, trial: Trial) -> float:
        """Train one trial and return its best value."""
        problem = self._problem
        self._check_direction(trial.study)
        member = problem.member(trial.number, suggest(trial, problem.space))
        problem.signature(member)  # raises what keeps it from being trained
        trial.set_user_attr(ENVIRONMENT, record_environment(trial.study, problem))
        running = RunningTrial(trial, member, problem.maximize)
        cohort = problem.cohort([member])
        with single_threaded_blas:
            for _, scores in run_to_end([cohort]):
                running.add_scores(scores, 0)
                running.report()
                outcome = TrialOutcome.from_cause(scores.ended[0])
                if outcome is None and trial.should_prune():
                    outcome = TrialOutcome.PRUNED
                if outcome is not None:
                    break
        assert outcome is not None
        ends_early = outcome.state == TrialState.PRUNED
        if not ends_early:
            running.exact_value = evaluate_best(cohort, 0)
        running.describe(problem, cohort.iterations[0], outcome)
        if ends_early:
            raise optuna.TrialPruned(f"Trial {trial.number}: {outcome.value}.")
        assert running.best is not None
        with self._lock:
            kept = self._kept.setdefault(trial.study._storage, {})
            before = kept.get(trial.study._study_id)
            if before is None or running.is_better(running.best, before[0]):
                weights = BestWeights(None)
                weights.save(trial.number, cohort.best_network(0))
                kept[trial.study._study_id] = running.best, weights
        return running.best

    def result(self, study: Study) -> Result:
        """The study's best trial as a model, as `optimize` returns it."""
        kept = self._kept.get(study._storage, {})
        _, weights = kept.get(study._study_id, (0.0, BestWeights(None)))
        return Result(study, self._problem, weights)

    def _check_direction(self, study: Study) -> None:
        if study.direction.name.lower() != self.direction:
            raise ValueError(
                f"The study's direction must be {self.direction!r} for "
                f"{self._problem.metric.name}, but is {study.direction.name.lower()!r}."
            )
