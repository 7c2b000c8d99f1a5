"""Population-based training: trials that continue from the state of better ones."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
import math
from typing import Any

from optuna import Study
from optuna.distributions import BaseDistribution
from optuna.distributions import CategoricalDistribution
from optuna.distributions import FloatDistribution
from optuna.distributions import IntDistribution
from optuna.samplers import BaseSampler
from optuna.samplers import RandomSampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial
from optuna.trial import TrialState

from optuna_nnhp.search._optuna_internals import LazyRandomState
from optuna_nnhp.search._optuna_internals import all_trials
from optuna_nnhp.search._optuna_internals import set_user_attr
from optuna_nnhp.search._optuna_internals import trial_id
from optuna_nnhp.search.unit_scale import from_unit
from optuna_nnhp.search.unit_scale import is_in_distribution
from optuna_nnhp.search.unit_scale import to_unit

# Attributes of every trial of a population.
GENERATION, SLOT, PARENT, POPULATION = "generation", "slot", "parent", "population"
RESAMPLE_PROBABILITY = 0.25  # that a choice is drawn again when a child is perturbed


@dataclass(frozen=True)
class Lineage:
    """A trial's place in its population.

    Args:
        slot:
            The member that the trial continues.
        generation:
            The number of trials of this member before.
        parent:
            Number of the trial from whose state it continues; None in the first generation.
        is_copy:
            Whether the parent is a trial of another member, which was better.
    """

    slot: int
    generation: int
    parent: int | None = None
    is_copy: bool = False


class PopulationSampler(BaseSampler):
    """Choose the trial from which the next one continues, and its values.

    A population has ``size`` members. A trial trains one member for one generation. A member then
    continues from its own last state with the same values; if it is among the worst of the
    population, it continues from one of the best instead (exploit) and perturbs the values
    (explore). The objective function has to do the training: ``trial.user_attrs["parent"]`` is the
    number of the trial to continue from, None in the first generation. It must store the trial's
    state (weights, optimizer) where later trials find it.

    The trials' attributes ``generation``, ``slot`` and ``parent`` hold all of the sampler's state,
    so a study can be continued, also by several workers.

    Args:
        size:
            The number of members, at least 2.
        base:
            Sampler that proposes the first generation; random if None.
        quantile:
            Share of the population that is replaced, and share that is copied, up to 0.5.
        factor:
            Size of a perturbation, above 1: values of logarithmic ranges are multiplied or divided
            by it; others move by ``log10(factor)`` widths of their range.
        inherited:
            Names of parameters that a child never perturbs, such as structural ones.
        population:
            Name of the population, if a study has several; trials of others are ignored.
        seed:
            Seed of the random numbers.

    Raises:
        ValueError: If ``size`` is below 2, ``quantile`` is not above 0 and at most 0.5, or
            ``factor`` is not above 1.

    Example:
        >>> import optuna
        >>> def objective(trial):
        ...     parent = trial.user_attrs["parent"]
        ...     start = 0.0 if parent is None else trial.study.trials[parent].value
        ...     return start + 1 - abs(trial.suggest_float("x", -1, 1))
        >>> study = optuna.create_study(
        ...     direction="maximize", sampler=PopulationSampler(size=4, seed=0)
        ... )
        >>> study.optimize(objective, n_trials=20)
        >>> study.best_trial.user_attrs["generation"], study.best_value > 3
        (4, True)

    Source:
        Jaderberg et al. 2017, "Population based training of neural networks" (arXiv:1711.09846).
    """

    def __init__(
        self,
        *,
        size: int = 16,
        base: BaseSampler | None = None,
        quantile: float = 0.25,
        factor: float = 1.25,
        inherited: Collection[str] = (),
        population: str = "",
        seed: int | None = None,
    ) -> None:
        if size < 2:
            raise ValueError(f"`size` must be at least 2, but got {size}.")
        if not 0 < quantile <= 0.5:
            raise ValueError(f"`quantile` must be above 0 and at most 0.5, but got {quantile}.")
        if factor <= 1:
            raise ValueError(f"`factor` must be above 1, but got {factor}.")
        self.size, self._quantile, self._factor = size, quantile, factor
        self._base = base if base is not None else RandomSampler(seed=seed)
        self._inherited, self._population = frozenset(inherited), population
        self._rng = LazyRandomState(seed)
        self._lineages: dict[int, tuple[Lineage, dict[str, Any]]] = {}  # by trial id

    def set_size(self, size: int) -> None:
        """Change the number of members of a population that has not started."""
        self.size = size

    def reseed_rng(self) -> None:
        """Reseed the random numbers, and the base sampler."""
        self._rng.rng.seed()
        self._base.reseed_rng()

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Choose the trial's place in the population, and store it as the trial's attributes."""
        self._base.before_trial(study, trial)
        lineage, params = self._next_lineage(study, trial.number)
        self._lineages[trial_id(trial)] = lineage, params
        for name, value in (
            *((GENERATION, lineage.generation), (SLOT, lineage.slot), (PARENT, lineage.parent)),
            *([(POPULATION, self._population)] if self._population else []),
        ):
            set_user_attr(study, trial, name, value)

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """Return the base sampler's space in the first generation, else no space."""
        if self._lineage(trial).parent is not None:
            return {}
        return self._base.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Propose by the base sampler in the first generation, else nothing."""
        if self._lineage(trial).parent is not None:
            return {}
        return self._base.sample_relative(study, trial, search_space)

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        """Return the parent's value, perturbed if the parent is another member."""
        lineage, params = self._lineages.get(trial_id(trial), (Lineage(0, 0), {}))
        if param_name not in params or not is_in_distribution(
            param_distribution, params[param_name]
        ):
            return self._base.sample_independent(study, trial, param_name, param_distribution)
        value = params[param_name]
        if not lineage.is_copy or param_name in self._inherited:
            return value
        return self._perturb(param_distribution, value)

    def after_trial(
        self, study: Study, trial: FrozenTrial, state: TrialState, values: Any
    ) -> None:
        """Forget the trial's place, which is stored in its attributes."""
        self._lineages.pop(trial_id(trial), None)
        self._base.after_trial(study, trial, state, values)

    def _lineage(self, trial: FrozenTrial) -> Lineage:
        return self._lineages.get(trial_id(trial), (Lineage(0, 0), {}))[0]

    def _next_lineage(self, study: Study, number: int) -> tuple[Lineage, dict[str, Any]]:
        """Return the place of a new trial, and its parent's values."""
        last: dict[int, FrozenTrial] = {}  # the last trial of each member, if it is COMPLETE
        n_trials_of = dict.fromkeys(range(self.size), 0)
        running = set[int]()
        for trial in all_trials(study):
            slot = trial.user_attrs.get(SLOT)
            mine = trial.user_attrs.get(POPULATION, "") == self._population
            if trial.number == number or slot not in n_trials_of or not mine:
                continue
            if trial.state == TrialState.FAIL:
                continue
            n_trials_of[slot] += 1
            if trial.state == TrialState.RUNNING:
                running.add(slot)
            elif trial.state == TrialState.COMPLETE:
                last[slot] = trial
            else:  # pruned: its state is not continued
                last.pop(slot, None)
        slot = min(n_trials_of, key=lambda s: (s in running, n_trials_of[s], s))
        if n_trials_of[slot] == 0 or not last:
            return Lineage(slot, n_trials_of[slot]), {}
        parent, is_copy = self._choose_parent(study, last, slot)
        return Lineage(slot, n_trials_of[slot], parent.number, is_copy), dict(parent.params)

    def _choose_parent(
        self, study: Study, last: dict[int, FrozenTrial], slot: int
    ) -> tuple[FrozenTrial, bool]:
        """Choose a member's parent: its last trial, or one of the best if that is bad."""
        sign = -1.0 if study.direction == StudyDirection.MAXIMIZE else 1.0
        ranked = sorted(last.values(), key=lambda t: (sign * (t.value or 0.0), t.number))
        count = max(1, int(self._quantile * self.size))
        best = ranked[:count]
        own = last.get(slot)
        if own is not None and (own in best or own not in ranked[-count:]):
            return own, False
        return best[self._rng.rng.randint(len(best))], True

    def _perturb(self, distribution: BaseDistribution, value: Any) -> Any:
        """Return a value near another one."""
        rng = self._rng.rng
        if isinstance(distribution, CategoricalDistribution):
            if rng.rand() >= RESAMPLE_PROBABILITY:
                return value
            return distribution.choices[rng.randint(len(distribution.choices))]
        assert isinstance(distribution, FloatDistribution | IntDistribution)
        if distribution.single():
            return value
        part = math.log10(self._factor)
        if distribution.log:
            part /= math.log10(distribution.high / distribution.low)
        unit, up = to_unit(distribution, value), bool(rng.rand() < 0.5)
        moved = from_unit(distribution, unit + (part if up else -part))
        if moved == value:  # at an end of the range, or less than one step
            step = (distribution.step or 0.0) * (1 if up else -1)
            if not distribution.low <= value + step <= distribution.high:
                step = -step
            moved = (
                value + step if step else from_unit(distribution, unit + (-part if up else part))
            )
        return moved
