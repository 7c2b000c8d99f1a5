"""What a study found."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
import optuna
from optuna import Study
from optuna.trial import FrozenTrial
from optuna.trial import TrialState
import pandas as pd
from torch import nn

from optuna_nnhp.inspect.replay import ABSOLUTE_TOLERANCE
from optuna_nnhp.inspect.replay import RELATIVE_TOLERANCE
from optuna_nnhp.inspect.replay import Replay
from optuna_nnhp.inspect.replay import replay_trial
from optuna_nnhp.inspect.replicates import best_replicated_trial
from optuna_nnhp.inspect.replicates import replicates_dataframe
from optuna_nnhp.inspect.retraining import best_round
from optuna_nnhp.inspect.retraining import retrain_trial
from optuna_nnhp.inspect.retraining import with_trial_seed
from optuna_nnhp.study.running_trial import member_at_best_round
from optuna_nnhp.templates.language_model import LanguageModel
from optuna_nnhp.templates.predictor import Predictor
from optuna_nnhp.templates.supervised import Template
from optuna_nnhp.training.best_weights import BestWeights

_logger = optuna.logging.get_logger(f"optuna.{__name__}")


class Result:
    """A study's best trial as a model, and the study itself.

    Args:
        study:
            The Optuna study.
        problem:
            What was tuned.
        weights:
            The best trials' weights.

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
        self._predictors: dict[int, Predictor | LanguageModel] = {}

    @property
    def best_trial(self) -> FrozenTrial:
        """The best trial; of equal ones the first.

        With replicates that with the best mean over the other seeds, as far as there are as many
        of it as of any other, or one less. Its value is then not always the study's best one.
        """
        if (chosen := best_replicated_trial(self.study)) is not None:
            return self.study.get_trials(deepcopy=False)[chosen.number]
        complete = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if not complete:
            raise RuntimeError(
                "A best trial must have finished, but none of the study's "
                f"{len(self.study.get_trials(deepcopy=False))} has: give it more time or trials."
            )
        sign = 1 if self._problem.maximize else -1
        return max(complete, key=lambda t: (sign * (t.value or 0.0), -t.number))

    @property
    def best_params(self) -> dict[str, Any]:
        """What was tuned, as the best trial had it; if it changed, see `schedule`."""
        return dict(self.best_trial.params)

    @property
    def schedule(self) -> pd.DataFrame:
        """The values that the best trial had over its training, one row per stage.

        Column ``epoch`` says when the stage began (for language models as a share of the budget),
        the others are what was tuned. One row at epoch 0, unless the method changes values while
        a trial trains (``"population"``, ``"gradient"``). The weights are those of the trial's
        attribute ``best_epoch``: later stages did not form them.

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
        from optuna_nnhp.inspect.schedules import schedule_dataframe  # imports plotly

        return schedule_dataframe(self.study, self.best_trial)

    @property
    def best_value(self) -> float:
        """Return the best trial's metric on the validation part, which is the value of `model`."""
        value = self.best_trial.value
        assert value is not None
        return value

    @property
    def model(self) -> nn.Module:
        """Return the best trial's network, as it was at its best epoch.

        It maps features to logits, or to standardized numbers for a regression; and token ids to
        logits for a language model.

        Shape:
            - Input: ``(rows, features)``; output: ``(rows, classes)`` or ``(rows, 1)``.
        """
        return self.predictor.model

    def predict(self, X: Any) -> NDArray[Any]:
        """Predicted labels, or numbers in the target's units; see `Predictor`."""
        return self._of_table("predict").predict(X)

    def predict_proba(self, X: Any) -> NDArray[Any]:
        """Predicted probability of each class, ``(rows, classes)``."""
        return self._of_table("predict_proba").predict_proba(X)

    def score(self, X: Any, y: Any) -> float:
        """The study's metric on other data."""
        return self._of_table("score").score(X, y)

    def generate(self, prompt: str | None = None, tokens: int = 200, **options: Any) -> str:
        """Continue a text by the best language model; see `LanguageModel.generate`.

        Example:
            >>> from optuna_nnhp import optimize
            >>> fixed = {"iterations": 9, "width": 16, "layers": 1}
            >>> text = "to be or not to be\\n" * 99
            >>> result = optimize("gpt", text, n_trials=1, storage=None, fixed=fixed)
            >>> len(result.generate("to be", tokens=10))
            15
        """
        predictor = self.predictor
        if not isinstance(predictor, LanguageModel):
            raise TypeError("`generate` must be called for language models, not for tables.")
        return predictor.generate(prompt, tokens, **options)

    def _of_table(self, name: str) -> Predictor:
        predictor = self.predictor
        if not isinstance(predictor, Predictor):
            raise TypeError(f"`{name}` must be called for tables; language models `generate`.")
        return predictor

    @property
    def replicates(self) -> pd.DataFrame:
        """What the best configurations came to with other seeds, that with the best mean first.

        One row for each: the trial's ``number``, its ``value`` in the study, and of ``n`` fresh
        seeds the ``mean`` and the standard deviation ``std``. If ``diverged`` of them have no
        value, the mean is infinite, on the bad side. No rows in a study without replicates.

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
        """One row per trial: value, parameters, curves and all attributes."""
        return self.study.trials_dataframe()

    def save(self, folder: str | Path) -> Path:
        """Write the model to a folder (safetensors and JSON) for `optuna_nnhp.load`."""
        return self.predictor.save(folder)

    @property
    def predictor(self) -> Predictor | LanguageModel:
        """The best trial as something that predicts from data like the study's."""
        number = self.best_trial.number
        if number not in self._predictors:
            self._predictors = {number: self._predictor(number)}
        return self._predictors[number]

    def _predictor(self, number: int) -> Predictor | LanguageModel:
        trial = self.study.get_trials(deepcopy=False)[number]
        member = member_at_best_round(self._problem, trial)
        if number in self._weights:
            network = self._weights.load_into(number, self._problem.network(member))
        else:
            network = self._retrain(trial)
        return self._problem.predictor(network, member, dict(trial.params), trial.value or 0.0)

    def replay(self, number: int | None = None) -> Replay:
        """Judge and train a trial again, alone, and compare with what the study recorded.

        Stored weights have the trial's value exactly; training gives it within a tolerance that
        the answer states, and on the same machine and versions exactly.

        Args:
            number:
                The trial's number; that of the best one if None.

        Raises:
            ValueError: If there is no such trial, it was not trained, or its weights are damaged.

        Example:
            >>> from optuna_nnhp import optimize
            >>> X = [[float(i)] for i in range(40)]
            >>> result = optimize(
            ...     "dnn", X, [i[0] > 9 for i in X], n_trials=1, storage=None, fixed={"epochs": 2}
            ... )
            >>> again = result.replay()
            >>> again.stored_value == again.retrained_value == result.best_value
            True
        """
        number = self.best_trial.number if number is None else number
        return replay_trial(self.study, self._problem, self._weights, number)

    def _retrain(self, trial: FrozenTrial) -> nn.Module:
        """Train a trial again, whose weights are not here: same seed, same data, same course."""
        _logger.warning(f"The weights of trial {trial.number} are not here: training it again.")
        problem = with_trial_seed(self.study, self._problem, trial)
        again = retrain_trial(problem, trial, best_round(problem, trial))
        assert again.network is not None
        if not math.isclose(
            again.value, trial.value or 0.0, rel_tol=RELATIVE_TOLERANCE, abs_tol=ABSOLUTE_TOLERANCE
        ):
            _logger.warning(  # another machine
                f"Trial {trial.number} reached {trial.value:.6g}, but {again.value:.6g} this time."
            )
        self._weights.save(trial.number, again.network)
        return again.network
