"""Propose a narrower search space from a study's trials, with a reason for each range."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

from optuna import Study
from optuna.distributions import BaseDistribution
from optuna.distributions import CategoricalDistribution
from optuna.distributions import FloatDistribution
from optuna.distributions import IntDistribution
from optuna.distributions import json_to_distribution
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial
from optuna.trial import TrialState

from optuna_nnhp.search.narrowing import Choices
from optuna_nnhp.search.narrowing import NarrowingConfig
from optuna_nnhp.search.narrowing import ParameterAxis
from optuna_nnhp.search.narrowing import narrow
from optuna_nnhp.search.narrowing import restrict_distribution
from optuna_nnhp.search.ordering import sort_key

MIN_FINISHED_TRIALS = 10
BEST_DIVISOR, MAX_BEST = (
    5,
    25,
)  # one of five trials is among the best, 25 at most
# Of ten bounds that have no effect, one is cut by chance. With a p-value of 0.05, three hundred
# trials of the default space narrowed no range, not even that of the learning rate.
NARROWING = NarrowingConfig(
    min_width_ratio=0.25, trim_fraction=0.1, cut_p_value=0.1, drop_p_value=0.01
)
EDGE_DISTANCE, CROWD_DIVISOR = (
    0.1,
    3,
)  # a third of the best trials within a tenth of an end
MAX_LISTED_CHOICES = 5  # choices that `describe_distribution` names
SPACE_ATTRIBUTE = "space"  # study attribute
BY_HAND, NO_EFFECT = "set by hand", "no clear effect"


class ZoomedSpace(dict[str, BaseDistribution]):
    """A search space derived from a study: a dict of distributions, which can be edited.

    Args:
        space:
            The proposed distributions.
        old:
            The study's distributions.
        reasons:
            The reason for each proposal, by name.
        source:
            Name of the study.
        best:
            Parameters of the study's best trial.

    Attributes:
        old: The study's distributions.
        reasons: The reason for each range; that of a range assigned later is "set by hand".
        source: Name of the study.
        best: Parameters of the study's best trial.

    Example:
        >>> old = {"depth": IntDistribution(1, 8)}
        >>> new = {"depth": IntDistribution(2, 4)}
        >>> space = ZoomedSpace(new, old, {"depth": "the best are there"}, "first", {"depth": 3})
        >>> print(space)
        zoomed from study 'first'
        parameter  old range  new range  reason
        depth      1 to 8     2 to 4     the best are there
        >>> space["depth"] = IntDistribution(2, 6)
        >>> space.reasons["depth"]
        'set by hand'
    """

    def __init__(
        self,
        space: Mapping[str, BaseDistribution],
        old: Mapping[str, BaseDistribution],
        reasons: Mapping[str, str],
        source: str,
        best: Mapping[str, Any],
    ) -> None:
        super().__init__(space)
        self.old, self.reasons = dict(old), dict(reasons)
        self.source, self.best = source, dict(best)

    def __reduce__(self) -> tuple[type[ZoomedSpace], tuple[Any, ...]]:
        return ZoomedSpace, (dict(self), self.old, self.reasons, self.source, self.best)

    def __setitem__(self, name: str, distribution: BaseDistribution) -> None:
        super().__setitem__(name, distribution)
        self.reasons[name] = BY_HAND

    def update(self, *args: Any, **kwargs: BaseDistribution) -> None:
        """Update the distributions as a dict does, and their reasons."""
        for name, distribution in dict(*args, **kwargs).items():
            self[name] = distribution

    def __ior__(self, other: Any) -> ZoomedSpace:  # type: ignore[override]
        self.update(other)
        return self

    def __or__(self, other: Any) -> ZoomedSpace:  # type: ignore[override]
        joined = self.copy()
        joined.update(other)
        return joined

    def copy(self) -> ZoomedSpace:
        """Return a copy with the same reasons and source."""
        return ZoomedSpace(self, self.old, self.reasons, self.source, self.best)

    def __repr__(self) -> str:
        rows = [("parameter", "old range", "new range", "reason")]
        for name, distribution in self.items():
            old = describe_distribution(self.old[name]) if name in self.old else "none"
            rows.append(
                (name, old, describe_distribution(distribution), self.reasons.get(name, BY_HAND))
            )
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = [
            "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]])
            for row in rows
        ]
        return "\n".join([f"zoomed from study {self.source!r}", *lines])

    __str__ = __repr__


def describe_distribution(distribution: BaseDistribution) -> str:
    """Return a distribution in words.

    Example:
        >>> (
        ...     describe_distribution(FloatDistribution(1e-4, 0.1, log=True)),
        ...     describe_distribution(IntDistribution(2, 8, step=2)),
        ... )
        ('0.0001 to 0.1, log', '2 to 8, step 2')
    """
    if isinstance(distribution, CategoricalDistribution):
        count = len(distribution.choices)
        return (
            f"{count} choices"
            if count > MAX_LISTED_CHOICES
            else ", ".join(map(str, distribution.choices))
        )
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    text = f"{distribution.low:.4g} to {distribution.high:.4g}"
    if isinstance(distribution, IntDistribution):
        text = f"{distribution.low} to {distribution.high}"
    step = distribution.step
    plain = step is None or (step == 1 and isinstance(distribution, IntDistribution))
    return text + (", log" if distribution.log else "") + ("" if plain else f", step {step:g}")


def zoom(study: Study) -> ZoomedSpace:
    """Propose a narrower search space from a study's trials, for a new study.

    A range is narrowed to where nearly all of the best trials lie (the best fifth, 25 at most),
    but not below a quarter of its width (of its logarithm if it is logarithmic). Choices are
    dropped if none of the best trials has them and their trials rank clearly behind the others.
    Ranges without a clear effect stay. The result is a dict with reasons, to be printed, edited,
    and passed to `optimize` as ``space``.

    Args:
        study:
            A study of one objective, sampled in any way. COMPLETE trials rank first, then
            pruned ones by their last step.

    Returns:
        The space, which contains the best trial.

    Raises:
        ValueError: If the study has several objectives, or fewer than ten finished trials.

    Example:
        >>> import optuna
        >>> sampler = optuna.samplers.RandomSampler(seed=0)
        >>> study = optuna.create_study(study_name="first", sampler=sampler)
        >>> space = {"x": FloatDistribution(0, 1), "y": FloatDistribution(0, 1)}
        >>> for _ in range(50):
        ...     trial = study.ask(space)
        ...     _ = study.tell(trial, (trial.params["x"] - 0.3) ** 2)
        >>> print(zoom(study))
        zoomed from study 'first'
        parameter  old range  new range  reason
        x          0 to 1     0 to 0.33  9 of the best 10 trials lie there
        y          0 to 1     0 to 1     no clear effect
    """
    if len(study.directions) > 1:
        raise ValueError(
            f"`study` must have one objective to zoom in on, but has {len(study.directions)}."
        )
    states = (TrialState.COMPLETE, TrialState.PRUNED)
    trials = study.get_trials(deepcopy=False, states=states)
    if len(trials) < MIN_FINISHED_TRIALS:
        raise ValueError(
            f"`study` must have at least {MIN_FINISHED_TRIALS} finished trials to zoom in on, but "
            f"{study.study_name!r} has {len(trials)}."
        )
    sign = -1.0 if study.direction == StudyDirection.MAXIMIZE else 1.0
    ranked = sorted(trials, key=lambda trial: (sort_key(trial, sign), trial.number))
    old = _space_of_study(study, ranked)
    new: dict[str, BaseDistribution] = {}
    reasons: dict[str, str] = {}
    for name, distribution in old.items():
        new[name], reasons[name] = _propose_distribution(ParameterAxis(name, distribution), ranked)
    return ZoomedSpace(new, old, reasons, study.study_name, ranked[0].params)


def _space_of_study(study: Study, trials: Sequence[FrozenTrial]) -> dict[str, BaseDistribution]:
    """Return the distributions that the study was started with, or the latest of its trials."""
    noted = study.user_attrs.get(SPACE_ATTRIBUTE)
    if noted is not None:
        return {name: json_to_distribution(text) for name, text in noted.items()}
    found: dict[str, BaseDistribution] = {}
    for trial in sorted(trials, key=lambda trial: trial.number):
        found |= trial.distributions
    return found


def _propose_distribution(
    axis: ParameterAxis, ranked: Sequence[FrozenTrial]
) -> tuple[BaseDistribution, str]:
    """Return a parameter's new distribution, and the reason."""
    positions = [
        axis.position(trial.params[axis.name])
        for trial in ranked
        if trial.distributions.get(axis.name) == axis.distribution
    ]
    count = min(len(positions) // BEST_DIVISOR, MAX_BEST)
    if axis.distribution.single():
        return axis.distribution, "one value only"
    if len(positions) < MIN_FINISHED_TRIALS:
        return axis.distribution, f"{NO_EFFECT}: {len(positions)} finished trials have it"
    best, whole = positions[: max(count, 2)], axis.full_range()
    part = narrow(axis, whole, best, positions, NARROWING)
    new = restrict_distribution(axis, part)
    if isinstance(part, Choices):
        return new, _reason_for_dropped_choices(axis, part, len(best))
    there = sum(part.low <= position <= part.high for position in best)
    found = f"{there} of the best {len(best)} trials lie there"
    reason = found if new != axis.distribution else NO_EFFECT
    return new, reason + _warn_of_best_at_range_end(axis, best)


def _reason_for_dropped_choices(axis: ParameterAxis, part: Choices, count: int) -> str:
    """Return the reason for the choices that are left."""
    assert isinstance(axis.distribution, CategoricalDistribution)
    choices = axis.distribution.choices
    dropped = [str(choices[i]) for i in range(len(choices)) if i not in part.indices]
    if not dropped:
        return NO_EFFECT
    return f"dropped {', '.join(dropped)}: none of the best {count} trials, and clearly worse"


def _warn_of_best_at_range_end(axis: ParameterAxis, best: Sequence[float]) -> str:
    """Return a hint if many of the best trials lie near an end of the whole range."""
    for end, side in ((0.0, "lower"), (1.0, "upper")):
        crowd = sum(abs(position - end) <= EDGE_DISTANCE for position in best)
        if abs(best[0] - end) <= EDGE_DISTANCE and crowd * CROWD_DIVISOR >= len(best):
            return f"; the best is at the {side} end, a larger range may be better"
    return ""
