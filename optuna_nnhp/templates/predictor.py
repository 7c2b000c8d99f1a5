"""A trained network together with everything between a table and its answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
import torch
from torch import Tensor
from torch import nn

from optuna_nnhp.data.frames import as_frame
from optuna_nnhp.data.frames import as_target
from optuna_nnhp.data.frames import check_lengths
from optuna_nnhp.data.preprocessor import Preprocessor
from optuna_nnhp.data.target import Target
from optuna_nnhp.data.target import check_target
from optuna_nnhp.hyperparameters.catalogue import records
from optuna_nnhp.networks.mlp import build_mlp
from optuna_nnhp.training.checkpoint import load_weights
from optuna_nnhp.training.checkpoint import save_weights
from optuna_nnhp.training.metrics import METRICS
from optuna_nnhp.training.metrics import Metric
from optuna_nnhp.version import __version__

ROWS_AT_ONCE = 65536
WEIGHTS, RECORD = "model.safetensors", "model.json"
FORMAT = 1
SHAPE = ("hidden_layers", "width", "width_shape", "activation", "normalization")


@dataclass(frozen=True)
class TabularPredictor:
    """Predicts from tables: preprocessing, network, and the way back to labels or units.

    Args:
        model:
            The network, a plain `nn.Module` from features to logits or standardized numbers.
        preprocessor:
            From tables to features, fitted on the training part.
        target:
            From outputs to labels or units.
        metric:
            What `score` computes; None if it was a user's function that was not saved.
        params:
            Hyperparameters of the network as trained: what is off is 0.
        best_params:
            Hyperparameters as proposed, of what was tuned.
        best_value:
            Metric on the validation part.

    Shape:
        - model: ``(rows, features)`` to ``(rows, classes)`` or ``(rows, 1)``.
    """

    model: nn.Module
    preprocessor: Preprocessor
    target: Target
    metric: Metric | None
    params: dict[str, Any]
    best_params: dict[str, Any]
    best_value: float

    @property
    def classes(self) -> list[Any]:
        """Labels in the order of the columns of `predict_proba`; empty for a regression."""
        return list(self.target.classes)

    def predict(self, X: Any) -> NDArray[Any]:
        """Predicted labels, or numbers in the target's units.

        Args:
            X:
                A table with the columns of the training table.

        Shape:
            - X: ``(rows, columns)``; output: ``(rows,)``.
        """
        outputs = self._outputs(X)
        if self.target.task == "regression":
            return self.target.decode(outputs.squeeze(-1).numpy())
        return self.target.decode(outputs.argmax(-1).numpy())

    def predict_proba(self, X: Any) -> NDArray[np.float64]:
        """Predicted probability of each class.

        Shape:
            - X: ``(rows, columns)``; output: ``(rows, classes)``, in the order of `classes`.

        Raises:
            ValueError: If the task is a regression.
        """
        if self.target.task == "regression":
            raise ValueError(
                "`predict_proba` must be called for classes, but this predicts numbers."
            )
        probabilities: NDArray[np.float64] = self._outputs(X).double().softmax(-1).numpy()
        return probabilities

    def score(self, X: Any, y: Any) -> float:
        """The study's metric on other data.

        Shape:
            - X: ``(rows, columns)``; y: ``(rows,)``, labels or numbers.
        """
        if self.metric is None:
            raise ValueError(
                "`score` must have a metric, but a function of the user's is not saved."
            )
        frame, labels = as_frame(X), as_target(y)
        check_lengths(frame, labels)
        check_target(labels)
        outputs, truth = self._outputs(frame)[None], torch.as_tensor(self.target.encode(labels))
        return float(self.metric.compute(*to_units(self.target, outputs, truth)))

    def save(self, folder: str | Path) -> Path:
        """Write the weights (safetensors) and everything else (JSON) to a folder.

        Returns:
            The folder; `optuna_nnhp.load` reads it.
        """
        folder = Path(folder)
        save_weights(self.model, folder / WEIGHTS)
        record = {
            "format": FORMAT,
            "template": "dnn",
            "version": __version__,
            "metric": self.metric.name if self.metric and self._metric_is_ours() else None,
            "params": {n: None if v == math.inf else v for n, v in self.params.items()},
            "best_params": self.best_params,
            "best_value": self.best_value,
            "preprocessor": self.preprocessor.to_json(),
            "target": self.target.to_json(),
        }
        (folder / RECORD).write_text(
            json.dumps(record, indent=1, allow_nan=False), encoding="utf-8"
        )
        return folder

    def _metric_is_ours(self) -> bool:  # a user's function may bear the same name
        return self.metric in METRICS.values()

    def _outputs(self, X: Any) -> Tensor:
        """Outputs of the network, on the CPU: ``(rows, classes)`` or ``(rows, 1)``."""
        features = torch.from_numpy(self.preprocessor.transform(X))
        with torch.no_grad():
            return torch.cat([self.model(rows) for rows in features.split(ROWS_AT_ONCE)])


def load(folder: str | Path) -> TabularPredictor:
    """Read what `TabularPredictor.save` wrote; nothing in the files is executed.

    Raises:
        FileNotFoundError: If the folder or one of its two files is not there.
        ValueError: If a file is damaged, or from a newer version.
    """
    folder = Path(folder)
    for name in (RECORD, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} must hold a saved model, but has no {name}.")
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        if record["format"] != FORMAT:
            raise ValueError(f"its format must be {FORMAT}, but is {record['format']}")
        preprocessor = Preprocessor.from_json(record["preprocessor"])
        target = Target.from_json(record["target"])
        params: Mapping[str, Any] = record["params"]
        for name in SHAPE:
            records(target.task)[name].check(params[name])
        inputs = len(preprocessor.feature_names)
        model = build_mlp(params, inputs, max(1, len(target.classes)))
        best = {"best_params": record["best_params"], "best_value": record["best_value"]}
        metric = METRICS.get(record["metric"])
    except (KeyError, TypeError, ValueError) as error:
        text = f"{RECORD} must be one that `save` wrote, but cannot be read: {error}"
        raise ValueError(text) from error
    load_weights(model, folder / WEIGHTS)
    return TabularPredictor(model, preprocessor, target, metric, dict(params), **best)


def to_units(target: Target, outputs: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs and truth as metrics want them: numbers in their own units, float64.

    Shape:
        - outputs: ``(k, rows, classes)``, unchanged; or ``(k, rows, 1)``, to ``(k, rows)``.
        - truth: ``(rows,)``.
    """
    if target.task != "regression":
        return outputs, truth
    numbers = outputs.squeeze(-1).double() * target.scale + target.mean
    return numbers, truth.double() * target.scale + target.mean
