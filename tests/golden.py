"""Record what seeded studies come to, and compare it bit for bit.

``python -m tests.golden write FILE`` records the values of the package that is imported, and
``python -m tests.golden check [FILE]`` compares them with a record (``tests/golden.json`` if no
file is given). ``--only NAME`` runs one study. Use one thread: ``OMP_NUM_THREADS=1``.

A change that is meant to keep behaviour must pass the check. A change that is meant to alter
values writes the record anew in a commit of its own that says why.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from contextlib import ExitStack
from contextlib import contextmanager
import hashlib
import json
import os
from pathlib import Path
import platform
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any
from unittest.mock import patch

import numpy as np
import optuna
from optuna.distributions import FloatDistribution
from optuna.distributions import IntDistribution
import sklearn
from sklearn.datasets import load_diabetes
from sklearn.datasets import load_digits
from sklearn.datasets import load_iris
import torch
from torch import nn

import optuna_nnhp
from optuna_nnhp.study import autotune
from optuna_nnhp.study.checkpoints import Checkpoints

RECORD = Path(__file__).with_name("golden.json")
COHORT = 4  # trials of a cohort, where the study is told how many
EPOCHS = 9
WIDTHS = IntDistribution(8, 24, log=True)
KILL_AFTER = 6  # trials that have ended
# Names of hyperparameters that a record may still have, and what they are called now.
RENAMED = {"squared_decay": "beta2", "final_fraction": "min_lr_ratio"}

Values = dict[str, Any]


# --- All that is patched inside the package ---


@contextmanager
def without_clock(*, every_round: bool = False) -> Iterator[None]:
    """Replace what depends on the clock: the measured cohort size, and when checkpoints are due.

    Args:
        every_round:
            Whether checkpoints are written after every round; else when they are due.
    """
    throughput = autotune.Throughput
    with (
        tempfile.TemporaryDirectory() as cache,
        patch.dict(os.environ, XDG_CACHE_HOME=cache),
        patch.dict(autotune._known, clear=True),
        patch.object(autotune, "_measure", lambda make, most: throughput(min(most, COHORT), 1e-4)),
        ExitStack() as stack,
    ):
        if every_round:
            stack.enter_context(patch.object(Checkpoints, "is_due", lambda self: self.is_enabled))
        yield


# --- Studies ---


def _iris() -> tuple[Any, Any]:
    X, y = load_iris(return_X_y=True)
    return X, y


def _diabetes() -> tuple[Any, Any]:
    X, y = load_diabetes(return_X_y=True)
    return X[:200], y[:200]


def _digits() -> tuple[Any, Any]:
    X, y = load_digits(return_X_y=True)
    return X[:240], y[:240]


def _dnn(data: tuple[Any, Any], frame: str | None = None, **options: Any) -> Values:
    """A study of the template for tables, and a frame of its result by name."""
    given: dict[str, Any] = {
        "space": {"width": WIDTHS},
        "fixed": {"epochs": EPOCHS},
        "cohort_size": COHORT,
    }
    given |= {"storage": None, "checkpoint_every": None, "n_trials": 8, "seed": 1} | options
    return _values(optuna_nnhp.optimize("dnn", *data, **given), data, frame)


def bayes_classification(folder: Path) -> Values:
    """TPE with pruning, classes."""
    return _dnn(_digits(), n_trials=24)


def bayes_measured_size(folder: Path) -> Values:
    """The default way: default configuration and portfolio first, cohorts as measured."""
    return _dnn(_digits(), n_trials=30, cohort_size=None, metric="log_loss")


def grid_regression(folder: Path) -> Values:
    """A grid, numbers, without pruning."""
    levels = {"learning_rate": [0.1, 0.01, 0.001], "optimizer": ["sgd", "adamw"], "dropout": [0.2]}
    pruner = optuna.pruners.NopPruner()
    return _dnn(
        _diabetes(), method="grid", levels=levels, cohort_size=None, n_trials=20, pruner=pruner
    )


def random_with_replicates(folder: Path) -> Values:
    """Random values; the best configurations again with two other seeds; mean absolute error."""
    return _dnn(
        _diabetes(),
        "replicates",
        method="random",
        replicates=2,
        pruner=optuna.pruners.NopPruner(),
        metric="mae",
        seed=3,
    )


def quasi_random_median_pruner(folder: Path) -> Values:
    """Sobol points, and a pruner of Optuna's that is asked trial by trial."""
    pruner = optuna.pruners.MedianPruner(n_startup_trials=3, n_warmup_steps=2)
    return _dnn(_iris(), method="quasi-random", n_trials=12, pruner=pruner)


def zoom(folder: Path) -> Values:
    """Zooming, over several rounds."""
    options = {"round_size": 8}
    return _dnn(_iris(), method="zoom", method_options=options, n_trials=24, seed=2)


def gaussian_process(folder: Path) -> Values:
    """Optuna's Gaussian process."""
    space = {"learning_rate": FloatDistribution(1e-3, 1e-1, log=True), "width": WIDTHS}
    return _dnn(_iris(), method="bayes-gp", n_trials=13, space=space)


def gradient(folder: Path) -> Values:
    """Hypergradients."""
    return _dnn(_digits(), "schedule", method="gradient", n_trials=6, cohort_size=None)


def evolution(folder: Path) -> Values:
    """Optuna's genetic algorithm."""
    return _dnn(_iris(), method="evolution", n_trials=20)


def population(folder: Path) -> Values:
    """Population-based training."""
    options = {"size": 6, "generations": 4}
    return _dnn(
        _digits(),
        "schedule",
        method="population",
        method_options=options,
        n_trials=12,
        cohort_size=None,
    )


def gpt(folder: Path) -> Values:
    """A small GPT on a tiny text."""
    text = "".join(f"{n} and {n + 1} make {2 * n + 1}.\n" for n in range(600))
    fixed = {"iterations": 60, "context": 32, "layers": 1, "heads": 2, "head_size": 16}
    fixed |= {"batch_tokens": 256}
    result = optuna_nnhp.optimize(
        "gpt", text, fixed=fixed, n_trials=5, storage=None, cohort_size=2, seed=1
    )
    values = _values(result, None)
    predictor: Any = result.predictor
    values["bits_per_byte"] = float(predictor.bits_per_byte("30 and 31 make 61.\n")).hex()
    return values


def _convolution(params: Mapping[str, Any]) -> nn.Module:
    channels = params["channels"]
    return nn.Sequential(
        nn.Conv2d(1, channels, 3, padding=1),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(params["dropout"]),
        nn.Linear(16 * channels, 10),
    )


class _Recurrent(nn.Module):
    def __init__(self, units: int) -> None:
        super().__init__()
        self.gru = nn.GRU(8, units, batch_first=True)
        self.head = nn.Linear(units, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        states: torch.Tensor = self.gru(x)[0]
        logits: torch.Tensor = self.head(states[:, -1])
        return logits


def _own(network: Callable[..., nn.Module], X: Any, **options: Any) -> Values:
    given: dict[str, Any] = {"fixed": {"epochs": 4, "batch_size": 32}, "storage": None, "seed": 1}
    y = _digits()[1]
    result = optuna_nnhp.optimize(
        network=network, X=X, y=y, checkpoint_every=None, **given | options
    )
    return _values(result, (X, y))


def own_stacked(folder: Path) -> Values:
    """Convolutions that are trained as one stack."""
    images = _digits()[0].reshape(-1, 1, 8, 8) / 16
    space = {"channels": IntDistribution(2, 4)}
    return _own(_convolution, images, space=space, n_trials=8, cohort_size=COHORT)


def own_alone(folder: Path) -> Values:
    """A recurrent network, which cannot be stacked."""
    rows = _digits()[0].reshape(-1, 8, 8) / 16
    space = {"units": IntDistribution(4, 8)}
    return _own(
        lambda params: _Recurrent(params["units"]), rows, space=space, n_trials=5, cohort_size=2
    )


def objective(folder: Path) -> Values:
    """The objective function in plain Optuna, with a pruner."""
    X, y = _iris()
    function = optuna_nnhp.Objective(
        "dnn", X, y, fixed={"epochs": EPOCHS}, space={"width": WIDTHS}, metric="log_loss", seed=4
    )
    study = optuna.create_study(
        direction=function.direction,
        sampler=optuna.samplers.TPESampler(seed=4, n_startup_trials=3),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=2, n_warmup_steps=2),
    )
    study.enqueue_trial(function.defaults)
    study.optimize(function, n_trials=8)
    return _values(function.result(study), (X, y))


def continued(folder: Path) -> Values:
    """A study that is called again with more trials, and again."""
    storage = str(folder / "continued.journal")
    for n_trials in (6, 11):
        values = _dnn(_iris(), n_trials=n_trials, storage=storage, metric="log_loss")
    return values


def _killed(folder: Path) -> Values:
    kill = _Kill() if os.environ.get(_CHILD) else None
    return _dnn(
        _digits(),
        n_trials=16,
        storage=str(folder / "killed.journal"),
        checkpoint_every=60,
        callbacks=[kill] if kill else None,
        seed=5,
    )


class _Kill:
    """Kills its own process when some trials have ended."""

    def __call__(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        if sum(one.state.is_finished() for one in study.get_trials(deepcopy=False)) >= KILL_AFTER:
            os.kill(os.getpid(), signal.SIGKILL)


_CHILD = "GOLDEN_CHILD"


def killed(folder: Path) -> Values:
    """A study whose process is killed while trials run; the same call again goes on with them."""
    command = [sys.executable, "-m", "tests.golden", "child", str(folder)]
    root, environment = Path(__file__).parents[1], os.environ | {_CHILD: "1"}
    child = subprocess.run(command, cwd=root, env=environment, capture_output=True, check=False)
    if child.returncode != -signal.SIGKILL:
        raise RuntimeError(f"The child was not killed: {child.stderr.decode()}")
    return _killed(folder)


STUDIES: tuple[Callable[[Path], Values], ...] = (
    bayes_classification,
    bayes_measured_size,
    grid_regression,
    random_with_replicates,
    quasi_random_median_pruner,
    zoom,
    gaussian_process,
    gradient,
    evolution,
    population,
    gpt,
    own_stacked,
    own_alone,
    objective,
    continued,
    killed,
)


# --- Values ---


def _exact(value: Any) -> Any:
    """Numbers as JSON keeps them exactly: floats in hexadecimal."""
    return float(value).hex() if isinstance(value, float) else value


def _values(result: Any, data: tuple[Any, Any] | None, frame: str | None = None) -> Values:
    """All that a study has come to."""
    values: Values = {
        "best_value": _exact(float(result.best_value)),
        "best_trial": result.best_trial.number,
        "trials": [_trial(trial) for trial in result.study.get_trials(deepcopy=False)],
    }
    if data is not None:
        X, y = data
        values["predict"] = _checksum(result.predict(X))
        if np.issubdtype(y.dtype, np.integer):  # classes
            values["predict_proba"] = _checksum(result.predict_proba(X))
    if frame is not None:
        rows = getattr(result, frame).select_dtypes("number").to_numpy()
        values[frame] = [[_exact(float(value)) for value in row] for row in rows]
    return values


def _trial(trial: optuna.trial.FrozenTrial) -> Values:
    return {
        "number": trial.number,
        "state": trial.state.name,
        "value": _exact(trial.value),
        "params": {name: _exact(value) for name, value in trial.params.items()},
        "steps": {str(n): _exact(v) for n, v in sorted(trial.intermediate_values.items())},
    }


def _checksum(array: Any) -> str:
    values = np.ascontiguousarray(array)
    if values.dtype == object:
        return hashlib.sha256(repr(values.tolist()).encode()).hexdigest()[:32]
    return hashlib.sha256(values.tobytes()).hexdigest()[:32]


def machine() -> dict[str, str]:
    """All that values depend on besides the code: they are exact on one kind of machine only."""
    package, models = Path(optuna_nnhp.__file__).parent, [platform.processor()]
    if (info := Path("/proc/cpuinfo")).exists():
        models += [line for line in info.read_text().splitlines() if line.startswith("model name")]
    is_compiled = any(package.rglob("*.so")) and os.environ.get("OPTUNA_NNHP_ENGINE") != "torch"
    return {
        "processor": models[-1].partition(":")[2].strip() or models[-1],
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "engine": "compiled" if is_compiled else "torch",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "scikit-learn": sklearn.__version__,
        "optuna": optuna.__version__,
    }


def record(only: str | None = None) -> dict[str, Values]:
    """Run the studies and return their values by name.

    Args:
        only:
            The name of one study; all if None.
    """
    torch.set_num_threads(1)
    studies: dict[str, Values] = {}
    for study in STUDIES:
        if only in (None, study.__name__):
            with tempfile.TemporaryDirectory() as folder, without_clock():
                started = time.monotonic()
                studies[study.__name__] = study(Path(folder))
                print(f"{study.__name__}: {time.monotonic() - started:.1f} s", file=sys.stderr)
    return studies


def read(file: Path = RECORD) -> tuple[dict[str, str], dict[str, Values]]:
    """Read a record: the machine that wrote it, and the studies' values by name."""
    content = json.loads(file.read_text())
    return content["machine"], content["studies"]


def write(file: Path, studies: Mapping[str, Values]) -> None:
    """Write a record, with one line for every trial."""
    lines = ["{", f'"machine": {json.dumps(machine())},', '"studies": {']
    for i, (name, values) in enumerate(studies.items()):
        rest = {key: value for key, value in values.items() if key != "trials"}
        lines.append(f'"{name}": {json.dumps(rest)[:-1]}, "trials": [')
        lines += [",\n".join(json.dumps(trial) for trial in values["trials"])]
        lines.append("]}" + ("," if i + 1 < len(studies) else ""))
    file.write_text("\n".join([*lines, "}", "}", ""]))


def differences(old: Mapping[str, Values], new: Mapping[str, Values]) -> list[str]:
    """Say where two records of the same studies differ; of each study the first few places."""
    found = []
    for name, values in new.items():
        if name not in old:
            found.append(f"{name}: not in the record")
            continue
        before, after = _flat(_renamed(old[name])), _flat(_renamed(values))
        places = [key for key in {**before, **after} if before.get(key) != after.get(key)]
        found += [f"{name}: {key}: {before.get(key)} -> {after.get(key)}" for key in places[:5]]
        if len(places) > 5:
            found.append(f"{name}: {len(places)} differences in all")
    return found


def _renamed(values: Any) -> Any:
    """Give hyperparameters the names that they have now."""
    if isinstance(values, dict):
        return {RENAMED.get(key, key): _renamed(value) for key, value in values.items()}
    return [_renamed(value) for value in values] if isinstance(values, list) else values


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested values by path."""
    if not isinstance(values, dict | list):
        return {prefix: values}
    flat: dict[str, Any] = {}
    for key, value in values.items() if isinstance(values, dict) else enumerate(values):
        flat |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def main(argv: list[str] | None = None) -> int:
    """Write or check a record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=["write", "check", "child"])
    parser.add_argument("file", type=Path, nargs="?", default=RECORD)
    parser.add_argument("--only", help="name of one study")
    options = parser.parse_args(argv)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if options.command == "child":
        torch.set_num_threads(1)
        with without_clock(every_round=True):
            _killed(options.file)
        return 1
    studies = record(options.only)
    if options.command == "write":
        write(options.file, studies)
        return 0
    where, old = read(options.file)
    if where != machine():
        print(f"The record was written elsewhere: {where}, and this is {machine()}.")
    found = differences(old, studies)
    print("\n".join(found) or f"{len(studies)} studies have the recorded values.")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
