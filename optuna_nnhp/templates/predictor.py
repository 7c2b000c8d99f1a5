"""A trained network with the preprocessing of a user's data and the decoding of its outputs."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
from dataclasses import dataclass
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
import torch
from torch import Tensor
from torch import nn

from optuna_nnhp.data.arrays import ARRAY_KIND
from optuna_nnhp.data.arrays import ArrayPreprocessor
from optuna_nnhp.data.frames import as_target
from optuna_nnhp.data.frames import check_consistent_length
from optuna_nnhp.data.preprocessor import Preprocessor
from optuna_nnhp.data.supervised import InputPreprocessor
from optuna_nnhp.data.target import Target
from optuna_nnhp.data.target import check_target
from optuna_nnhp.hyperparameters.catalogue import specs
from optuna_nnhp.templates.model_files import write_model_files
from optuna_nnhp.training.metrics import METRICS
from optuna_nnhp.training.metrics import Metric
from optuna_nnhp.training.metrics import to_target_units

# The most numbers and rows of a prediction's batch.
MAX_BATCH_NUMBERS, MAX_BATCH_ROWS = 2**22, 65536


@dataclass(frozen=True)
class Predictor:
    """Predicts from tables or arrays: preprocessing, network, decoding to labels or units.

    Args:
        model:
            The network, a plain `nn.Module` from features to logits or standardized numbers.
        preprocessor:
            From tables to features, fitted on the training part; an array's is only checked.
        target:
            From outputs to labels or units.
        metric:
            The metric of `score`; None if it was a user's function, which is not saved.
        params:
            Hyperparameters of the network as trained; those that are off are 0.
        best_params:
            The tuned hyperparameters as proposed.
        best_value:
            The metric on the validation part.
        template:
            Name of the template.
        builder:
            Name of the function that made the network, if it was the user's own.

    Shape:
        - model: ``(rows, features)`` to ``(rows, classes)`` or ``(rows, 1)``; an own network
          from ``(rows, ...)``, and to ``(rows,)`` too.
    """

    model: nn.Module
    preprocessor: InputPreprocessor
    target: Target
    metric: Metric | None
    params: dict[str, Any]
    best_params: dict[str, Any]
    best_value: float
    template: str
    builder: str | None = None

    @property
    def classes(self) -> list[Any]:
        """Labels in the order of the columns of `predict_proba`; empty for a regression."""
        return list(self.target.classes)

    def predict(self, X: Any) -> NDArray[Any]:
        """Predict labels, or numbers in the target's units.

        Args:
            X:
                A table with the columns of the training table, or an array like the training
                array.

        Shape:
            - X: ``(rows, columns)`` or ``(rows, ...)``; output: ``(rows,)``.
        """
        outputs = self._outputs(X)
        if self.target.task == "regression":
            return self.target.decode(outputs.squeeze(-1).numpy())
        return self.target.decode(outputs.argmax(-1).numpy())

    def predict_proba(self, X: Any) -> NDArray[np.float64]:
        """Predict the probability of each class.

        Shape:
            - X: as for `predict`; output: ``(rows, classes)``, in the order of `classes`.

        Raises:
            ValueError: If the task is a regression.
        """
        if self.target.task == "regression":
            raise ValueError(
                "`predict_proba` must be called for classes, but the task is a regression."
            )
        probabilities: NDArray[np.float64] = self._outputs(X).double().softmax(-1).numpy()
        return probabilities

    def score(self, X: Any, y: Any) -> float:
        """Compute the study's metric on other data.

        Shape:
            - X: as for `predict`; y: ``(rows,)``, labels or numbers.
        """
        if self.metric is None:
            raise ValueError(
                "`score` must have a metric, but the metric was a function, which is not saved."
            )
        features, labels = self.preprocessor.transform(X), as_target(y)
        check_consistent_length(features, labels)
        check_target(labels)
        truth = torch.as_tensor(self.target.encode(labels))
        outputs = self._forward(features)[None]
        return float(self.metric.compute(*to_target_units(self.target, outputs, truth)))

    def save(self, folder: str | Path) -> Path:
        """Write the weights (safetensors) and everything else (JSON) to a folder.

        Returns:
            The folder; `optuna_nnhp.load` reads it.
        """
        metadata = {
            "template": self.template,
            "builder": self.builder,
            "metric": self.metric.name if self.metric and self._is_builtin_metric() else None,
            "params": {n: None if v == math.inf else v for n, v in self.params.items()},
            "best_params": self.best_params,
            "best_value": self.best_value,
            "preprocessor": self.preprocessor.to_json(),
            "target": self.target.to_json(),
        }
        return write_model_files(folder, self.model, metadata)

    def _is_builtin_metric(self) -> bool:  # a user's function may bear the same name
        return self.metric in METRICS.values()

    def _outputs(self, X: Any) -> Tensor:
        """Return outputs of the network, on the CPU: ``(rows, classes)`` or ``(rows, 1)``."""
        return self._forward(self.preprocessor.transform(X))

    def _forward(self, features: NDArray[Any]) -> Tensor:
        each = max(1, features[0].size)
        rows = min(MAX_BATCH_ROWS, max(1, MAX_BATCH_NUMBERS // each))
        with torch.no_grad():
            parts = [self.model(part) for part in torch.from_numpy(features).split(rows)]
        outputs = torch.cat(parts)
        return outputs[:, None] if outputs.dim() == 1 else outputs


def restore_predictor(
    metadata: Mapping[str, Any],
    rebuild: Callable[[Mapping[str, Any], InputPreprocessor, Target], nn.Module],
) -> Predictor:
    """Return the predictor that `Predictor.save` wrote, its weights not yet loaded.

    Args:
        metadata:
            The contents of its JSON file.
        rebuild:
            Makes the network from its hyperparameters, the preprocessor and the target.

    Raises:
        ValueError: If an entry is damaged.
        KeyError: If an entry is missing.
    """
    target, state = Target.from_json(metadata["target"]), metadata["preprocessor"]
    preprocessor: InputPreprocessor = _restore_preprocessor(state)
    known = specs(target.task)
    params = dict(metadata["params"])
    params |= {n: math.inf for n in known if params.get(n, 0) is None}  # JSON has no infinity
    return Predictor(
        model=rebuild(params, preprocessor, target),
        preprocessor=preprocessor,
        target=target,
        metric=METRICS.get(metadata["metric"]),
        params=params,
        best_params=metadata["best_params"],
        best_value=metadata["best_value"],
        template=metadata["template"],
        builder=metadata.get("builder"),
    )


def _restore_preprocessor(state: Mapping[str, Any]) -> InputPreprocessor:
    if "kind" in state and state["kind"] == ARRAY_KIND:
        return ArrayPreprocessor.from_json(state)
    return Preprocessor.from_json(state)
