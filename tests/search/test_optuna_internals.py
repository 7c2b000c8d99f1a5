"""Each private part of Optuna that `search` uses, and that nothing else in `search` uses one.

A failing test names the part of `_optuna_internals` that a new version of Optuna has changed.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.distributions import CategoricalDistribution
from optuna.distributions import FloatDistribution
from optuna.distributions import IntDistribution
from optuna.samplers import CmaEsSampler
from optuna.samplers import RandomSampler
from optuna.samplers import TPESampler
from optuna.trial import FrozenTrial
from optuna.trial import TrialState
import pytest

from optuna_nnhp.search import _optuna_internals as internals

SPACE: dict[str, BaseDistribution] = {
    "rate": FloatDistribution(1e-3, 1.0, log=True),
    "depth": IntDistribution(1, 9),
    "shape": CategoricalDistribution(["round", "square"]),
}
MODULES = sorted(Path(internals.__file__).parent.glob("*.py"))


def random_study(n_trials: int = 20) -> optuna.Study:
    study = optuna.create_study(sampler=RandomSampler(seed=0))
    for i in range(n_trials):
        study.tell(study.ask(SPACE), float(i))
    return study


def frozen(study: optuna.Study) -> FrozenTrial:
    study.ask()
    return study.get_trials(deepcopy=False)[-1]


def private_names(path: Path) -> list[str]:
    """The private attributes and modules that a file uses without defining them."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    used, own = list[tuple[int, str]](), set[str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_"):
            name, owner = node.attr, node.value
            if isinstance(node.ctx, ast.Store) and ast.unparse(owner) == "self":
                own.add(name)
            used.append((node.lineno, name))
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            own.add(node.name)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            own.add(node.target.id)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("optuna."):
            parts = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            used += [(node.lineno, part) for part in parts if part.startswith("_")]
    dunder = {name for _, name in used if name.endswith("__")}
    return [f"{path.name}:{n} {name}" for n, name in used if name not in own | dunder]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_only_one_module_uses_private_names_of_optuna(path: Path) -> None:
    if path.stem == "_optuna_internals":
        assert any("_transform" in name for name in private_names(path))
    else:
        # A view of a study has the method that Optuna's sampler calls.
        known = ("_get_trials",) if path.stem == "evolution" else ()
        assert [name for name in private_names(path) if name.split()[1] not in known] == []


def test_every_public_name_has_a_test() -> None:
    text = Path(__file__).read_text(encoding="utf-8")
    assert [name for name in internals.__all__ if f"internals.{name}" not in text] == []


def test_search_space_transform_maps_values_to_numbers_and_back() -> None:
    transform = internals.SearchSpaceTransform(SPACE)
    assert transform.bounds[0].tolist() == pytest.approx([np.log(1e-3), 0.0])
    params = {"rate": 0.1, "depth": 3, "shape": "square"}
    assert transform.untransform(transform.transform(params)) == pytest.approx(params)
    unit = internals.SearchSpaceTransform({"rate": SPACE["rate"]}, transform_0_1=True)
    assert unit.transform({"rate": 0.1}).tolist() == pytest.approx([2 / 3])


def test_lazy_random_state_draws_what_numpy_draws() -> None:
    numbers = np.random.RandomState(5).rand(3)
    assert internals.LazyRandomState(5).rng.rand(3).tolist() == numbers.tolist()


def test_all_trials_returns_them_uncopied_and_by_state() -> None:
    study = random_study(3)
    study.ask()
    assert internals.all_trials(study) == study.trials
    complete = internals.all_trials(study, (TrialState.COMPLETE,))
    assert [trial.number for trial in complete] == [0, 1, 2]
    assert complete[0] is internals.all_trials(study, (TrialState.COMPLETE,))[0]


def test_all_trials_cached_are_those_of_the_last_ask() -> None:
    study = random_study(2)
    study.ask()
    assert len(internals.all_trials(study, cached=True)) == 3
    other = optuna.load_study(study_name=study.study_name, storage=internals.study_key(study)[0])
    other.ask()
    assert len(internals.all_trials(study)) == 4
    assert len(internals.all_trials(study, cached=True)) == 3
    study.ask()
    assert len(internals.all_trials(study, cached=True)) == 5


def test_all_trials_sees_those_that_a_hyperband_bracket_hides() -> None:
    pruner = optuna.pruners.HyperbandPruner(min_resource=1, max_resource=9)
    study = optuna.create_study(study_name="brackets", pruner=pruner)
    seen: list[int] = []

    class Sampler(RandomSampler):
        def sample_relative(self, study: Any, trial: Any, search_space: Any) -> dict[str, Any]:
            seen.append(len(internals.all_trials(study)) - len(study.get_trials()))
            return {}

    def objective(trial: optuna.Trial) -> float:
        trial.report(0.0, 1)
        trial.should_prune()  # makes the brackets
        return trial.suggest_float("x", 0, 1)

    study.sampler = Sampler(seed=0)
    study.optimize(objective, n_trials=12)
    assert max(seen) > 0


def test_a_hyperband_bracket_hides_trials_and_a_study_does_not() -> None:
    study = optuna.create_study(study_name="brackets")
    pruner = optuna.pruners.HyperbandPruner(min_resource=1, max_resource=9)
    assert not internals.hides_trials(study)
    assert internals.hides_trials(pruner._create_bracket_study(study, 0))


def test_study_key_is_the_same_for_the_same_study_only() -> None:
    storage = optuna.storages.InMemoryStorage()
    first, second = (optuna.create_study(storage=storage, study_name=n) for n in "ab")
    again = optuna.load_study(storage=storage, study_name="a")
    assert internals.study_key(first) == internals.study_key(again) != internals.study_key(second)
    assert internals.study_key(first)[0] is storage


def test_trial_id_is_what_the_storage_knows_a_trial_by() -> None:
    study = random_study(2)
    trial = study.trials[1]
    storage, _ = internals.study_key(study)
    assert storage.get_trial(internals.trial_id(trial)).number == 1


def test_set_user_attr_changes_the_storage_and_the_object() -> None:
    study = optuna.create_study()
    trial = frozen(study)
    internals.set_user_attr(study, trial, "origin", 3)
    assert trial.user_attrs == study.trials[0].user_attrs == {"origin": 3}


def test_check_single_objective_refuses_several_only() -> None:
    sampler = RandomSampler()
    internals.check_single_objective(sampler, optuna.create_study())
    with pytest.raises(ValueError, match="RandomSampler"):
        internals.check_single_objective(sampler, optuna.create_study(directions=["minimize"] * 2))


def test_contains_knows_ranges_and_steps() -> None:
    steps = IntDistribution(1, 9, step=2)
    assert [internals.contains(steps, value) for value in (1, 2, 9, 11)] == [1, 0, 1, 0]


def estimator_of(study: optuna.Study) -> internals.ParzenEstimator:
    sampler = internals.TPESamplerHooks(internals.ParzenEstimator, seed=0)
    return sampler.fit_density(study, SPACE, study.trials, good=True)


def test_kernels_of_a_parzen_estimator_have_the_fields_that_are_read() -> None:
    estimator = estimator_of(random_study())
    assert isinstance(estimator, internals.ParzenEstimator)
    weights, kernels = internals.kernels_of(estimator)
    assert weights.shape == (21,) and weights.sum() == pytest.approx(1.0)
    assert list(kernels) == list(SPACE)
    for name in ("rate", "depth"):
        kernel = kernels[name]
        assert kernel.mu.shape == kernel.sigma.shape == (21,)
        assert kernel.low < kernel.high and kernel.adapted_low < kernel.adapted_high
    assert (kernels["rate"].is_log, kernels["rate"].step) == (True, 0.0)
    assert (kernels["depth"].is_log, kernels["depth"].step) == (False, 1)
    assert kernels["shape"].weights.shape == (21, 2)


def test_is_categorical_kernel_tells_categories_from_numbers() -> None:
    _, kernels = internals.kernels_of(estimator_of(random_study()))
    found = [internals.is_categorical_kernel(kernels[name]) for name in SPACE]
    assert found == [False, False, True]


def test_tpe_sampler_hooks_propose_what_optuna_proposes() -> None:
    proposed = []
    for sampler in (
        TPESampler(seed=3, n_startup_trials=5),
        internals.TPESamplerHooks(internals.ParzenEstimator, seed=3, n_startup_trials=5),
    ):
        study = random_study()
        study.sampler = sampler
        proposed.append([study.ask(SPACE).params for _ in range(3)])
    assert proposed[0] == proposed[1]


def test_tpe_sampler_hooks_are_what_optuna_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    for name in ("sample_jointly", "sample_values", "internal_values"):
        original = getattr(internals.TPESamplerHooks, name)

        def noted(self: Any, *args: Any, name: str = name, original: Any = original) -> Any:
            called.append(name)
            return original(self, *args)

        monkeypatch.setattr(internals.TPESamplerHooks, name, noted)
    study = random_study()
    study.sampler = internals.TPESamplerHooks(internals.ParzenEstimator, seed=0)
    study.ask(SPACE)
    assert called == ["sample_jointly", "sample_values", "internal_values", "internal_values"]


def test_tpe_sampler_hooks_make_optunas_step_of_its_parts() -> None:
    study = random_study()
    sampler = internals.TPESamplerHooks(internals.ParzenEstimator, seed=3)
    assert sampler.is_joint(study) and sampler.n_startup_trials == 10
    assert sampler.counts_running_trials
    assert [sampler.count_good(n) for n in (1, 20, 1000)] == [1, 2, 25]
    trial = frozen(study)
    ranked = sorted(study.trials[:-1], key=lambda t: t.value or 0.0)
    good, others = ranked[:2], sorted(ranked[2:], key=lambda t: t.number)
    densities = [
        sampler.fit_density(study, SPACE, trials, good=is_good)
        for trials, is_good in ((good, True), (others, False))
    ]
    reference = TPESampler(seed=3)
    expected = reference.sample_relative(study, trial, SPACE)
    assert sampler.propose(densities[0], densities[1], SPACE) == expected
    assert sampler.params_of(study, study.trials[0]) == study.trials[0].params


def test_cma_es_sampler_hooks_restore_the_stored_optimizer() -> None:
    pickles: list[bytes | None] = []

    class Sampler(internals.CmaEsSamplerHooks):
        def restore_optimizer(self, trials: list[FrozenTrial]) -> Any:
            pickles.extend(self.stored_optimizer(trial) for trial in trials)
            return super().restore_optimizer(trials)

    def optimized(sampler: CmaEsSampler) -> list[float | None]:
        study = optuna.create_study(sampler=sampler)
        study.optimize(lambda t: t.suggest_float("x", -1, 1) + t.suggest_float("y", -1, 1), 20)
        return [trial.value for trial in study.trials]

    assert optimized(Sampler(seed=0)) == optimized(CmaEsSampler(seed=0))
    held = [state for state in pickles if state is not None]
    assert held and all(b"cmaes" in state for state in held)


def test_setup_bounds_optunas_version() -> None:
    text = (Path(__file__).parents[2] / "setup.cfg").read_text(encoding="utf-8")
    assert "optuna>=5,<6" in text
