"""The public call: tune a network on data."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from dataclasses import replace
from numbers import Integral
from numbers import Real
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.pruners import BasePruner
from optuna.pruners import NopPruner
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage
import torch
from torch import nn

from optuna_nnhp import rng
from optuna_nnhp.errors import hide_passwords
from optuna_nnhp.errors import short_repr
from optuna_nnhp.hyperparameters.spec import Value
from optuna_nnhp.inspect.result import Result
from optuna_nnhp.inspect.sample import store_generated_text
from optuna_nnhp.search.halving import CohortHalvingPruner
from optuna_nnhp.storages.open_storage import open_storage
from optuna_nnhp.storages.paths import DEFAULT_STORAGE
from optuna_nnhp.storages.paths import models_folder
from optuna_nnhp.study.budget import Budget
from optuna_nnhp.study.checkpoints import CHECKPOINT_INTERVAL
from optuna_nnhp.study.method_config import enqueue_source_best
from optuna_nnhp.study.method_config import parse_method
from optuna_nnhp.study.open_study import MODELS
from optuna_nnhp.study.open_study import open_study
from optuna_nnhp.study.open_study import without_cache
from optuna_nnhp.study.replicates import MAX_CONFIGURATIONS
from optuna_nnhp.study.replicates import ReplicateTrainer
from optuna_nnhp.study.replicates import check_replicates
from optuna_nnhp.study.trial_finisher import Callback
from optuna_nnhp.templates import Template
from optuna_nnhp.templates.problem_spec import ProblemSpec
from optuna_nnhp.training.best_weights import BestWeights
from optuna_nnhp.workers.launch import check_workers
from optuna_nnhp.workers.launch import delete_other_weights
from optuna_nnhp.workers.launch import run_workers
from optuna_nnhp.workers.study_metadata import store_search_config
from optuna_nnhp.workers.worker import WorkerConfig
from optuna_nnhp.workers.worker import build_problem
from optuna_nnhp.workers.worker import build_problem_on_free_device
from optuna_nnhp.workers.worker import run_tuner
from optuna_nnhp.workers.worker_pool import Executor

_logger = optuna.logging.get_logger(f"optuna.{__name__}")


def optimize(
    template: str = "dnn",
    X: Any = None,
    y: Any = None,
    *,
    network: Callable[[Mapping[str, Any]], nn.Module] | None = None,
    target: str | None = None,
    task: str | None = None,
    validation: Any = None,
    metric: str | Callable[[Any, Any], float] | None = None,
    direction: str | None = None,
    errors: str = "strict",
    preset: str | None = None,
    space: Mapping[str, BaseDistribution] | None = None,
    fixed: Mapping[str, Value] | None = None,
    n_trials: int | None = None,
    timeout: float | None = None,
    method: str | BaseSampler = "bayes",
    method_options: Mapping[str, Any] | None = None,
    levels: Mapping[str, Sequence[Value]] | None = None,
    replicates: int | None = None,
    sampler: BaseSampler | None = None,
    pruner: BasePruner | None = None,
    storage: str | Path | BaseStorage | None = DEFAULT_STORAGE,
    study_name: str | None = None,
    callbacks: Sequence[Callback] | None = None,
    show_progress_bar: bool = False,
    cohort_size: int | None = None,
    checkpoint_every: float | None = CHECKPOINT_INTERVAL,
    trial_timeout: float | None = None,
    seed: int = 0,
    device: str | torch.device | None = None,
    compile: bool = False,
    workers: int = 1,
    executor: Executor | None = None,
) -> Result:
    """Tune a network on data, many trials at once.

    The first trial is the catalogue's default configuration; for a text it depends on the text's
    size and the trial's budget, and may be a preset's. The same call again continues the
    same study, and does nothing more once it has its ``n_trials``.

    Args:
        template:
            ``"dnn"``: a multilayer perceptron on a table; ``"gpt"``: a small language model on a
            text.
        X:
            For ``"gpt"`` a text, or the path of a file or folder, or a list of them; Python's own
            documentation if None. Else a numpy array, pandas frame or torch tensor, or the path
            of a CSV file. With ``network``, an array or tensor is used as it is, whatever its
            dimensions.
        y:
            What to predict; with a CSV file, give ``target`` instead.
        network:
            A function of your own from parameters, a mapping, to a `torch.nn.Module`, instead of
            ``template``; ``space`` then names your parameters too. See
            `templates.CustomNetworkTemplate`.
        target:
            Column of the CSV file that is to be predicted.
        task:
            ``"classification"``, ``"binary"``, ``"multiclass"`` or ``"regression"``; inferred
            from the target if None.
        validation:
            Share of the rows that judges trials (stratified for classes; a fifth if None), or
            ``(X, y)``. Of a text the share at its end (a tenth if None), or another text or path.
        metric:
            ``"accuracy"`` (default for classes), ``"balanced_accuracy"``, ``"roc_auc"``,
            ``"log_loss"``, ``"f1"``; ``"rmse"`` (default for numbers), ``"mae"``, ``"r2"``; or a
            function ``f(y_true, y_pred)``, whose greater value is better unless ``direction``
            says otherwise.
        direction:
            ``"maximize"`` or ``"minimize"``; follows from the metric if None. Language models are
            judged by bits per byte, always.
        errors:
            What becomes of bytes of a text file that are not UTF-8: ``"strict"`` (an error),
            ``"replace"`` or ``"ignore"``.
        preset:
            A published GPT to begin with, at the size of a CPU; see `preset`.
        space:
            Distributions that replace the catalogue's, by name; and those of your own parameters.
            Of `zoom`: the study begins with the other one's best configuration.
        fixed:
            Values that are not to be tuned, by name.
        n_trials:
            Trials of the whole study, those of earlier calls included.
        timeout:
            Seconds of this call; trials are stopped within a training step of it.
        method:
            ``"grid"``, ``"random"``, ``"quasi-random"``, ``"zoom"``, ``"bayes"``, ``"bayes-gp"``,
            ``"gradient"``, ``"evolution"`` or ``"population"``, see `search.methods.METHODS`; or
            an Optuna sampler.
        method_options:
            Of the method: ``partial`` (grid: take the part that fits into the budget);
            ``round_size``, ``patience`` (zoom); ``n_startup_trials`` (bayes); ``starts``,
            ``rate`` (gradient); ``population_size`` (evolution); ``size``, ``generations``
            (population).
        levels:
            For a grid, values by name; all else keeps its default. The catalogue's levels of all
            that is tuned if None.
        replicates:
            How often the best five configurations are trained again with other seeds, as
            cohorts and within the timeout; the best trial is then the one with the best mean,
            see `Result.replicates`. None for no replicates.
        sampler:
            An Optuna sampler, the same as giving it as ``method``; with ``"gradient"`` and
            ``"population"`` it proposes what these leave to others.
        pruner:
            An Optuna pruner, asked trial by trial after every evaluation; successive halving over
            whole cohorts if None, no pruning with `optuna.pruners.NopPruner`. Not with
            ``"gradient"`` and ``"population"``, which prune nothing.
        storage:
            The path of a journal file, a URL (``"sqlite:///study.db"``), an Optuna storage, or
            None to keep the study in memory only. Other processes see running trials at most two
            seconds late.
        study_name:
            Name of the study; made of the template, the metric and the data if None.
        callbacks:
            Called with the study and the trial after each trial, as in Optuna. After
            ``study.stop()`` the trials that are running finish first.
        show_progress_bar:
            Whether to show a progress bar.
        cohort_size:
            Trials that are trained at once; if None as many as pays, which is measured once for
            each shape of network, within half of the free memory.
        seed:
            Seed of everything. With one worker the same seed and ``n_trials`` give the same
            study, if the sizes of cohorts are known or given: they are measured once on each
            machine.
        device:
            Where to train; CUDA if there is any, else the CPU, if None.
        compile:
            Whether `torch.compile` makes the networks' code, which takes seconds to minutes once
            for each shape. It pays for long trials of large networks; the compiled engine's
            networks (the templates' on a CPU) are not touched by it.
        checkpoint_every:
            Seconds between checkpoints of the running trials, beside the study's file: the same
            call goes on with them after a kill. They take 2 % of the time at most; None for none.
        trial_timeout:
            Seconds of training that each trial may take, with its cohort; it then ends as it
            stands. Looked at after each evaluation, and at each step of what torch trains.
        workers:
            Processes that work on the study, on this machine unless there is an ``executor``; they
            divide torch's threads. A process that dies is replaced, and its trials go on.
        executor:
            Where the workers run: whatever has ``submit`` as in PEP 3148, such as those of
            concurrent.futures, Dask, submitit or mpi4py. Each worker's ``timeout`` begins when it
            does, and ``callbacks`` are called in it. See the guide on many workers.

    Returns:
        The best model and the study.

    Shape:
        - X: ``(rows, columns)``, or with ``network`` ``(rows, ...)``; y: ``(rows,)``.

    Raises:
        ValueError: If anything in the data or the arguments makes no sense; nothing has been
            trained then.
        FileNotFoundError: If there is no such file.

    Example:
        >>> from sklearn.datasets import load_iris
        >>> X, y = load_iris(return_X_y=True)
        >>> fixed = {"epochs": 10}
        >>> result = optimize("dnn", X, y, n_trials=3, storage=None, fixed=fixed)
        >>> len(result.study.trials)
        3
    """
    _check_budget(n_trials, timeout, cohort_size)
    if study_name is not None and not isinstance(study_name, str):
        raise ValueError(f"`study_name` must be a text, but got {short_repr(study_name)}.")
    if callbacks is not None and not isinstance(callbacks, Sequence):
        raise ValueError(
            f"`callbacks` must be a list of functions, but got {short_repr(callbacks)}."
        )
    _check_seconds(checkpoint_every=checkpoint_every, trial_timeout=trial_timeout)
    rng.check_seed(seed)
    check_workers(workers, executor, storage)
    budget, count = Budget(n_trials, timeout), check_replicates(replicates)
    method_config = parse_method(method, sampler, method_options, levels, seed)
    method_config.reject_options(
        pruner=None if isinstance(pruner, NopPruner) else pruner,
        cohort_size=cohort_size,
        trial_timeout=trial_timeout,
    )
    if pruner is not None:
        _check_pruner(pruner)
    problem_spec = ProblemSpec(
        template,
        X,
        y,
        network,
        target=target,
        task=task,
        validation=validation,
        metric=metric,
        direction=direction,
        errors=errors,
        preset=preset,
        space=space,
        fixed=fixed,
        timeout=timeout,
        seed=seed,
        device=device,
        compile=compile,
    )
    config = WorkerConfig(
        problem_spec,
        storage,
        study_name or "",
        method_config,
        pruner,
        n_trials,
        options={
            "cohort_size": cohort_size,
            "kept": MAX_CONFIGURATIONS if count else 1,
            "checkpoint_every": checkpoint_every,
            "trial_timeout": trial_timeout,
        },
        callbacks=tuple(callbacks or ()),
        workers=workers,
    )
    return _run_study(config, budget, count, executor, show_progress_bar)


def _run_study(
    config: WorkerConfig,
    budget: Budget,
    replicates: int | None,
    executor: Executor | None,
    show_progress_bar: bool,
) -> Result:
    """Open the study and run it: here, or by a crew of workers."""
    problem, space = build_problem(config.problem_spec), config.problem_spec.space
    config.method_config.check(problem, budget)
    pruner = config.pruner or CohortHalvingPruner(min_resource=problem.min_resource)
    study, weights = _open_study_and_weights(
        problem, config.storage, config.study_name, config.method_config.sampler, pruner
    )
    enqueue_source_best(study, space, problem)
    study.sampler = config.method_config.sampler_for(study, few=problem.sequential)
    config = replace(config, study_name=study.study_name, folder=weights.folder)
    store_search_config(study, config)
    replication = ReplicateTrainer(problem, replicates, budget) if replicates else None
    is_crew = executor is not None or config.workers > 1
    if is_crew:
        run_workers(config, study, problem, budget, executor, show_progress_bar=show_progress_bar)
        delete_other_weights(
            study, BestWeights(weights.folder), config.options["kept"], problem.maximize
        )
    problem = build_problem_on_free_device(config.problem_spec, study, problem)
    callbacks = config.callbacks
    if replication is not None:
        replication.problem, callbacks = problem, (*callbacks, replication)
    if not is_crew:
        run_tuner(
            config, study, problem, budget, weights, callbacks, show_progress_bar=show_progress_bar
        )
    if replication is not None:
        replication.run(study, is_late=executor is not None)
    result = Result(without_cache(study), problem, weights)
    store_generated_text(result)
    return result


def _open_study_and_weights(
    problem: Template,
    storage: str | Path | BaseStorage | None,
    study_name: str,
    sampler: BaseSampler,
    pruner: BasePruner,
) -> tuple[optuna.Study, BestWeights]:
    """The study, created or continued, and the weights of its best trials."""
    opened = open_storage(storage)
    study = open_study(problem, opened, study_name, sampler, pruner)
    named = isinstance(storage, str | Path)
    if storage is not None:
        where = hide_passwords(str(storage), storage) if named else "its storage"
        _logger.info(f"The study {study.study_name!r} is kept in {where}.")
    folder = models_folder(opened, None if isinstance(storage, BaseStorage) else storage)
    return study, BestWeights(folder / study.user_attrs[MODELS] if folder else None)


def _check_budget(n_trials: Any, timeout: Any, cohort_size: Any) -> None:
    if n_trials is None and timeout is None:
        raise ValueError("`n_trials` or `timeout` must be given, but both are None.")
    for name, count in (("n_trials", n_trials), ("cohort_size", cohort_size)):
        if count is not None and (not _is_number(count, Integral) or count < 1):
            raise ValueError(f"`{name}` must be at least 1, but got {short_repr(count)}.")
    _check_seconds(timeout=timeout)


def _check_seconds(**given: Any) -> None:
    for name, seconds in given.items():
        if seconds is not None and not (_is_number(seconds, Real) and seconds > 0):
            raise ValueError(
                f"`{name}` must be more than 0 seconds, but got {short_repr(seconds)}."
            )


def _is_number(value: object, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _check_pruner(pruner: object) -> BasePruner:
    if not isinstance(pruner, BasePruner):
        raise ValueError(f"`pruner` must be an Optuna pruner, but got {short_repr(pruner)}.")
    return pruner
