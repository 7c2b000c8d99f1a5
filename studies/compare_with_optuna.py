"""Compare with plain Optuna code on the same budget.

One side is a usual Optuna objective: it builds a network, trains it alone in a loop with the data
in memory, reports every epoch and prunes by the median. The other side is `optuna_nnhp.optimize`.
Both have the same digits, the same split, the same epochs per trial and the same seconds. Their
best models are tested on digits that neither has seen.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
import sys
import time

import optuna
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
import torch
from torch import Tensor
from torch import nn

from optuna_nnhp import optimize

TIMEOUT = 60.0  # seconds for each side
EPOCHS = 50
TEST_SHARE = 0.2
VALIDATION_SHARE = 0.2
SEED = 0


@dataclass
class Row:
    """The result of one side."""

    name: str
    seconds: float
    trials: int
    epochs: int
    best: float
    test: float
    course: list[tuple[float, float]]  # seconds and best value since then


def build(trial: optuna.Trial, inputs: int, outputs: int) -> nn.Sequential:
    """Build a network as an Optuna user writes it."""
    layers: list[nn.Module] = []
    width = trial.suggest_int("width", 16, 1024, log=True)
    rate = trial.suggest_float("dropout", 0.0, 0.5)
    for _ in range(trial.suggest_int("layers", 1, 4)):
        layers += [nn.Linear(inputs, width), nn.ReLU(), nn.Dropout(rate)]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, outputs))


def train(trial: optuna.Trial, parts: list[Tensor], counter: list[int]) -> tuple[float, nn.Module]:
    """Train one network alone, and return its best accuracy over the epochs."""
    x, y, valid_x, valid_y = parts
    network = build(trial, x.shape[1], int(y.max()) + 1)
    kind = trial.suggest_categorical("optimizer", ["Adam", "AdamW", "RMSprop", "SGD"])
    stepper = getattr(torch.optim, kind)(
        network.parameters(), lr=trial.suggest_float("rate", 1e-5, 1e-1, log=True)
    )
    batch = trial.suggest_categorical("batch", [16, 32, 64, 128, 256])
    best = 0.0
    for epoch in range(1, EPOCHS + 1):
        network.train()
        for rows in torch.randperm(len(x)).split(batch):
            stepper.zero_grad()
            nn.functional.cross_entropy(network(x[rows]), y[rows]).backward()
            stepper.step()
        counter[0] += 1
        network.eval()
        with torch.no_grad():
            accuracy = float((network(valid_x).argmax(-1) == valid_y).float().mean())
        best = max(best, accuracy)
        trial.report(accuracy, epoch)
        if trial.should_prune():
            raise optuna.TrialPruned
    return best, network


def plain_optuna(parts: list[Tensor], test: list[Tensor], timeout: float, seed: int) -> Row:
    """Run the side of plain Optuna."""
    torch.manual_seed(seed)
    counter, course, kept = [0], [(0.0, 0.0)], list[nn.Module]()
    start = time.monotonic()

    def objective(trial: optuna.Trial) -> float:
        value, network = train(trial, parts, counter)
        if value > course[-1][1]:
            course.append((time.monotonic() - start, value))
            kept[:] = [network]
        return value

    study = optuna.create_study(
        direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed)
    )
    study.optimize(objective, timeout=timeout, show_progress_bar=True)
    seconds = time.monotonic() - start
    with torch.no_grad():
        right = kept[0].eval()(test[0]).argmax(-1) == test[1]
    trials = len(study.trials)
    score = float(right.float().mean())
    return Row("plain Optuna", seconds, trials, counter[0], course[-1][1], score, course)


def ours(parts: list[Tensor], test: list[Tensor], timeout: float, seed: int) -> Row:
    """Run the side of optuna_nnhp."""
    course = [(0.0, 0.0)]
    start = time.monotonic()

    def note(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        if trial.state == optuna.trial.TrialState.COMPLETE and (trial.value or 0) > course[-1][1]:
            course.append((time.monotonic() - start, trial.value or 0))

    result = optimize(
        "dnn",
        parts[0],
        parts[1],
        validation=(parts[2], parts[3]),
        fixed={"epochs": EPOCHS},
        timeout=timeout,
        storage=None,
        callbacks=[note],
        seed=seed,
        show_progress_bar=True,
    )
    seconds = time.monotonic() - start
    trials = result.study.get_trials(deepcopy=False)
    epochs = sum(t.user_attrs.get("epochs", 0) for t in trials)
    score = result.score(test[0], test[1])
    return Row("optuna_nnhp", seconds, len(trials), epochs, result.best_value, score, course)


def data(seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """Return the training, validation and test parts, standardized by the training part."""
    X, y = load_digits(return_X_y=True)
    X, X_test, y, y_test = train_test_split(
        X, y, test_size=TEST_SHARE, stratify=y, random_state=seed
    )
    X, X_valid, y, y_valid = train_test_split(
        X, y, test_size=VALIDATION_SHARE, stratify=y, random_state=seed
    )
    scaler = StandardScaler().fit(X)

    def features(table: object) -> Tensor:
        return torch.as_tensor(scaler.transform(table), dtype=torch.float32)

    parts = [features(X), torch.as_tensor(y), features(X_valid), torch.as_tensor(y_valid)]
    return parts, [features(X_test), torch.as_tensor(y_test)]


def table(plain: Row, stacked: Row) -> str:
    """Return a table of both sides, and the time of ours until the plain study's best value."""
    reached = [s for s, value in stacked.course if value >= plain.best]
    lines = [f"{'':34s}{plain.name:>14s}{stacked.name:>14s}"]
    for label, form, cells in (
        ("seconds", ".1f", (plain.seconds, stacked.seconds)),
        ("trials", "d", (plain.trials, stacked.trials)),
        ("epochs of a network per second", ".1f", _per_second(plain, stacked)),
        ("best accuracy, validation", ".4f", (plain.best, stacked.best)),
        ("accuracy, digits not seen", ".4f", (plain.test, stacked.test)),
    ):
        lines.append(f"{label:34s}{cells[0]:>14{form}}{cells[1]:>14{form}}")
    last = f"{plain.course[-1][0]:.1f}"
    ours_at = f"{reached[0]:.1f}" if reached else "not reached"
    lines.append(f"{'seconds to ' + plain.name + ' best value':34s}{last:>14s}{ours_at:>14s}")
    return "\n".join(lines)


def _per_second(*rows: Row) -> tuple[float, ...]:
    return tuple(row.epochs / row.seconds for row in rows)


def main(argv: list[str] | None = None) -> int:
    """Run both sides, one after the other."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--timeout",
        type=float,
        default=TIMEOUT,
        help=f"seconds for each side (default {TIMEOUT:g})",
    )
    parser.add_argument("--seed", type=int, default=SEED, help=f"seed (default {SEED})")
    options = parser.parse_args(argv)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    parts, test = data(options.seed)
    try:
        plain = plain_optuna(parts, test, options.timeout, options.seed)
        stacked = ours(parts, test, options.timeout, options.seed)
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(plain, stacked))
    return 0


if __name__ == "__main__":
    sys.exit(main())
