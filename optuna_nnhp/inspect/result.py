"""The result of a study: its best trial as a model, tables, and replays."""

from __future__ import annotations

from collections.abc import Callable
import math
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
import optuna
from optuna import Study
from optuna.trial import FrozenTrial
import pandas as pd
from torch import nn

from optuna_nnhp.inspect.replay import ABSOLUTE_TOLERANCE
from optuna_nnhp.inspect.replay import RELATIVE_TOLERANCE
from optuna_nnhp.inspect.replay import Replay
from optuna_nnhp.inspect.replay import best_round
from optuna_nnhp.inspect.replay import replay_trial
from optuna_nnhp.inspect.replay import retrain_trial
from optuna_nnhp.inspect.replay import with_trial_seed
from optuna_nnhp.inspect.replicates import replicates_dataframe
from optuna_nnhp.inspect.schedules import schedule_dataframe
from optuna_nnhp.inspect.summary import GENERATED_TEXT
from optuna_nnhp.inspect.summary import find_best_trial
from optuna_nnhp.study.running import member_at_best_round
from optuna_nnhp.templates.base import Template
from optuna_nnhp.templates.base import TrainedModel
from optuna_nnhp.training.weight_files import BestWeights

_logger = optuna.logging.get_logger(f"optuna.{__name__}")


class Result:
    """The best trial of a study as a model, and the study itself.

    Args:
        study:
            The Optuna study.
        problem:
            The problem that was tuned.
        weights:
            The weights of the best trials.

    Example:
        >>> import numpy as np
        >>> from optuna_nnhp import optimize
        >>> X = np.random.default_rng(0).normal(size=(200, 3))
        >>> y = np.where(X[:, 0] > 0, "up", "down")
        >>> fixed = {"epochs": 20, "width": 16}
        >>> result = optimize("dnn", X, y, n_trials=2, storage=None, fixed=fixed)
        >>> sorted(set(result.predict(X).tolist()))
        ['down', 'up']
        >>> result.best_value > 0.8
        True
    """

    def __init__(self, study: Study, problem: Template, weights: BestWeights) -> None:
        self.study = study
        self._problem, self._weights = problem, weights
        self._predictors: dict[int, TrainedModel] = {}

    @property
    def best_trial(self) -> FrozenTrial:
        """Return the best complete trial; among equal ones the first.

        With replicates it is the trial with the best mean over the other seeds, among those with
        the largest number of replicates or one less. Its value is then not always the best one.

        Raises:
            RuntimeError: If no trial is complete.
        """
        trial = find_best_trial(self.study)
        if trial is None:
            raise RuntimeError(
                "A best trial must have finished, but none of the study's "
                f"{len(self.study.get_trials(deepcopy=False))} has: give it more time or trials."
            )
        return trial

    @property
    def best_params(self) -> dict[str, Any]:
        """Return the tuned parameters of the best trial; if they changed, the last ones.

        See `schedule` for all of them.
        """
        return dict(self.best_trial.params)

    @property
    def best_value(self) -> float:
        """Return the metric of the best trial on the validation part, the value of `model`."""
        value = self.best_trial.value
        assert value is not None
        return value

    @property
    def schedule(self) -> pd.DataFrame:
        """Return the best trial's parameters during training, one row per segment.

        The column ``epoch`` is the epoch at which the segment began (for language models the
        share of the budget); the others are the tuned parameters. There is one row at epoch 0
        unless the method changes parameters during training (``"population"``, ``"gradient"``).
        The weights are those of the trial's attribute ``best_epoch``: later segments did not
        affect them.

        Example:
            >>> from optuna_nnhp import optimize
            >>> X = [[float(i)] for i in range(40)]
            >>> fixed = {"epochs": 4, "width": 16, "batch_size": 16}
            >>> result = optimize(
            ...     "dnn",
            ...     X,
            ...     [i[0] > 9 for i in X],
            ...     method="gradient",
            ...     n_trials=1,
            ...     storage=None,
            ...     fixed=fixed,
            ... )
            >>> result.schedule["epoch"].tolist()
            [0, 1, 2, 3]
        """
        return schedule_dataframe(self.study, self.best_trial)

    @property
    def replicates(self) -> pd.DataFrame:
        """Return the values of the best configurations with other seeds, best mean first.

        One row per configuration: the ``number`` of its trial, the trial's ``value`` in the
        study, and over ``n`` other seeds the ``mean`` and the standard deviation ``std``. If
        ``diverged`` of them have no value, the mean is the worst possible value, infinity. There
        are no rows without replicates.

        Example:
            >>> from optuna_nnhp import optimize
            >>> X = [[float(i)] for i in range(40)]
            >>> result = optimize(
            ...     "dnn", X, [i[0] > 9 for i in X], n_trials=1, storage=None, fixed={"epochs": 2}
            ... )
            >>> len(result.replicates)
            0
        """
        return replicates_dataframe(self.study)

    def trials_dataframe(self) -> pd.DataFrame:
        """Return one row per trial: value, parameters, learning curves and all attributes."""
        return self.study.trials_dataframe()

    @property
    def predictor(self) -> TrainedModel:
        """Return the best trial's network with everything needed to predict from new data."""
        number = self.best_trial.number
        if number not in self._predictors:
            self._predictors = {number: self._load_predictor(number)}
        return self._predictors[number]

    @property
    def model(self) -> nn.Module:
        """Return the best trial's network at its best epoch.

        It maps features to logits, or to standardized numbers for a regression; for a language
        model, token ids to logits.

        Shape:
            - Input: ``(rows, features)``; output: ``(rows, classes)`` or ``(rows, 1)``.
        """
        return self.predictor.model

    def predict(self, X: Any) -> NDArray[Any]:
        """Predict labels, or numbers in the target's units; see `Predictor`."""
        return self._method("predict")(X)  # type: ignore[no-any-return]

    def predict_proba(self, X: Any) -> NDArray[Any]:
        """Predict the probability of each class, ``(rows, classes)``."""
        return self._method("predict_proba")(X)  # type: ignore[no-any-return]

    def score(self, X: Any, y: Any) -> float:
        """Compute the study's metric on other data."""
        return self._method("score")(X, y)  # type: ignore[no-any-return]

    def generate(self, prompt: str | None = None, tokens: int = 200, **options: Any) -> str:
        """Continue a text with the best language model; see `LanguageModel.generate`.

        Example:
            >>> from optuna_nnhp import optimize
            >>> fixed = {"iterations": 9, "width": 16, "layers": 1}
            >>> text = "to be or not to be\\n" * 99
            >>> result = optimize("gpt", text, n_trials=1, storage=None, fixed=fixed)
            >>> len(result.generate("to be", tokens=10))
            15
        """
        return self._method("generate")(prompt, tokens, **options)  # type: ignore[no-any-return]

    def _method(self, name: str) -> Callable[..., Any]:
        """Return a method of the best model, which not all templates' models have."""
        method = getattr(self.predictor, name, None)
        if method is None:
            raise TypeError(
                f"`{name}` must be called for a model that has it, but the model of the template "
                f"{self._problem.template_name!r} has `{self._problem.model_method}`."
            )
        return method  # type: ignore[no-any-return]

    def store_generated_text(self) -> None:
        """Store a text that the best model writes in the study, unless it is there already.

        Notes and dashboards show it. Does nothing if the template's models write no text.
        """
        if not self._problem.samples_text:
            return
        best = find_best_trial(self.study)
        stored = self.study.user_attrs.get(GENERATED_TEXT, {})
        if best is not None and stored.get("trial") != best.number:
            text = self._problem.sample_text(self.predictor)
            self.study.set_user_attr(GENERATED_TEXT, {"trial": best.number, "text": text})

    def save(self, folder: str | Path) -> Path:
        """Write the model to a folder (safetensors and JSON) for `optuna_nnhp.load`."""
        return self.predictor.save(folder)

    def replay(self, number: int | None = None) -> Replay:
        """Score a trial's stored weights, retrain it alone, and compare with the recorded values.

        Stored weights have exactly the trial's value. Retraining reproduces it within the
        returned tolerance, and exactly with the same versions on the same machine.

        Args:
            number:
                Number of the trial; that of the best one if None.

        Raises:
            ValueError: If the trial does not exist, was not trained, or its weights are damaged.

        Example:
            >>> from optuna_nnhp import optimize
            >>> X = [[float(i)] for i in range(40)]
            >>> result = optimize(
            ...     "dnn", X, [i[0] > 9 for i in X], n_trials=1, storage=None, fixed={"epochs": 2}
            ... )
            >>> replayed = result.replay()
            >>> replayed.stored_value == replayed.retrained_value == result.best_value
            True
        """
        number = self.best_trial.number if number is None else number
        return replay_trial(self.study, self._problem, self._weights, number)

    def _load_predictor(self, number: int) -> TrainedModel:
        """Load the weights of a trial, or retrain it if they are missing."""
        trial = self.study.get_trials(deepcopy=False)[number]
        member = member_at_best_round(self._problem, trial)
        if number in self._weights:
            network = self._weights.load_into(number, self._problem.network(member))
        else:
            network = self._retrain(trial)
        return self._problem.predictor(network, member, dict(trial.params), trial.value or 0.0)

    def _retrain(self, trial: FrozenTrial) -> nn.Module:
        """Retrain a trial with the same seed, data and schedule, and keep its network."""
        _logger.warning(f"The weights of trial {trial.number} are missing: retraining it.")
        problem = with_trial_seed(self.study, self._problem, trial)
        result = retrain_trial(problem, trial, best_round(problem, trial))
        assert result.network is not None
        is_close = math.isclose(
            result.value,
            trial.value or 0.0,
            rel_tol=RELATIVE_TOLERANCE,
            abs_tol=ABSOLUTE_TOLERANCE,
        )
        if not is_close:  # as on another machine
            _logger.warning(
                f"Retrained trial {trial.number} has the value {result.value:.6g}, but its "
                f"recorded value is {trial.value:.6g}."
            )
        self._weights.save(trial.number, result.network)
        return result.network
