"""Provide an objective function for plain Optuna studies: the class `Objective`."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
import operator
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

from optuna_nnhp.engine.library import single_threaded_blas
from optuna_nnhp.inspect.result import Result
from optuna_nnhp.study._optuna_internals import storage_of
from optuna_nnhp.study._optuna_internals import study_id
from optuna_nnhp.study.environment import ENVIRONMENT
from optuna_nnhp.study.environment import record_environment
from optuna_nnhp.study.outcomes import TrialOutcome
from optuna_nnhp.study.running import RunningTrial
from optuna_nnhp.study.running import suggest
from optuna_nnhp.templates import DEFAULT_TEMPLATE
from optuna_nnhp.templates.problem_spec import make_problem
from optuna_nnhp.training.cohort import Cohort
from optuna_nnhp.training.cohort import run_to_end
from optuna_nnhp.training.weight_files import BestWeights

Direction = Literal["maximize", "minimize"]
# Best value and weights by study id, by storage.
BestByStudy = dict[int, tuple[float, BestWeights]]


class Objective:
    """An objective function for `optuna.Study.optimize`.

    Each trial is trained alone, with the same search space and networks as in `optimize`. Any
    sampler, pruner, storage, callbacks and ``n_jobs`` of the study can be used. The pruner is
    asked after each evaluation. `defaults` is the configuration that `optimize` tries first:
    ``study.enqueue_trial(objective.defaults)``.

    Args:
        template:
            As in `optimize`, like all other arguments.
        X:
            The table.
        y:
            Target to predict.
        network:
            A function of your own from parameters to a network; replaces ``template``.
        options:
            Any of ``target``, ``task``, ``validation``, ``metric``, ``direction``, ``space``,
            ``fixed``, ``seed``, ``device`` and ``compile``. The sampler has a seed of its own.

    Attributes:
        direction: ``"maximize"`` or ``"minimize"``; the study must have this direction.
        space: The search space, distributions by name.
        defaults: The catalogue's default values of the parameters in the space.

    Shape:
        - X: ``(rows, columns)``; y: ``(rows,)``.

    Raises:
        ValueError: If the data or an argument is not valid.
        optuna.TrialPruned: When called, if the study's pruner prunes the trial or it diverges.

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
        template: str = DEFAULT_TEMPLATE,
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
        # By storage too, since study ids are unique only within a storage.
        self._best = WeakKeyDictionary[BaseStorage, BestByStudy]()

    def __call__(self, trial: Trial) -> float:
        """Train one trial and return its best value."""
        problem = self._problem
        self._check_direction(trial.study)
        member = problem.member(trial.number, suggest(trial, problem.space))
        problem.signature(member)  # raises an error if the member cannot be trained
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
            running.exact_value = cohort.evaluate_best(0)
        running.describe(problem, cohort.iterations[0], outcome)
        if ends_early:
            raise optuna.TrialPruned(f"Trial {trial.number}: {outcome.value}.")
        assert running.best is not None
        self._keep_if_best(trial, running.best, cohort)
        return running.best

    def _keep_if_best(self, trial: Trial, value: float, cohort: Cohort) -> None:
        """Keep the weights of a trial if it is the best of its study so far."""
        with self._lock:
            best = self._best.setdefault(storage_of(trial.study), {})
            number = study_id(trial.study)
            is_better = operator.gt if self._problem.maximize else operator.lt
            if number not in best or is_better(value, best[number][0]):
                weights = BestWeights(None)
                weights.save(trial.number, cohort.best_network(0))
                best[number] = value, weights

    def result(self, study: Study) -> Result:
        """Return the best trial of a study as a model, like `optimize`.

        Args:
            study:
                A study that this object was the objective of.
        """
        best = self._best.get(storage_of(study), {})
        _, weights = best.get(study_id(study), (0.0, BestWeights(None)))
        return Result(study, self._problem, weights)

    def _check_direction(self, study: Study) -> None:
        """Raise unless a study has the direction of the metric."""
        if study.direction.name.lower() != self.direction:
            raise ValueError(
                f"The study's direction must be {self.direction!r} for "
                f"{self._problem.metric.name}, but got {study.direction.name.lower()!r}."
            )
