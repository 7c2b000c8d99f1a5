"""Tune a network on data: the function `optimize`."""

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
from optuna import Study
from optuna.distributions import BaseDistribution
from optuna.pruners import BasePruner
from optuna.pruners import NopPruner
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage
import torch
from torch import nn

from optuna_nnhp.errors import hide_passwords
from optuna_nnhp.errors import short_repr
from optuna_nnhp.hyperparameters.spec import Value
from optuna_nnhp.inspect.result import Result
from optuna_nnhp.rng import check_seed
from optuna_nnhp.search.halving import CohortHalvingPruner
from optuna_nnhp.storages.open_storage import DEFAULT_STORAGE
from optuna_nnhp.storages.open_storage import models_folder
from optuna_nnhp.storages.open_storage import open_storage
from optuna_nnhp.study._optuna_internals import storage_of
from optuna_nnhp.study.budget import Budget
from optuna_nnhp.study.checkpoints import CHECKPOINT_INTERVAL
from optuna_nnhp.study.method_config import enqueue_best_of_source_study
from optuna_nnhp.study.method_config import parse_method
from optuna_nnhp.study.open_study import MODELS
from optuna_nnhp.study.open_study import open_study
from optuna_nnhp.study.open_study import without_cache
from optuna_nnhp.study.replicates import MAX_CONFIGURATIONS
from optuna_nnhp.study.replicates import ReplicateTrainer
from optuna_nnhp.study.trial_finisher import Callback
from optuna_nnhp.templates import DEFAULT_TEMPLATE
from optuna_nnhp.templates import Template
from optuna_nnhp.templates.problem_spec import ProblemSpec
from optuna_nnhp.training.weight_files import BestWeights
from optuna_nnhp.workers.config import WorkerConfig
from optuna_nnhp.workers.launch import check_workers
from optuna_nnhp.workers.launch import keep_best_weights
from optuna_nnhp.workers.launch import run_workers
from optuna_nnhp.workers.worker_pool import Executor

_logger = optuna.logging.get_logger(f"optuna.{__name__}")


def optimize(
    template: str = DEFAULT_TEMPLATE,
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
    """Tune a network on data, training many trials at once.

    The first trial is the catalogue's default configuration. For a text, the default depends on
    the size of the text and the budget of a trial, and may come from a preset. The same call
    again resumes the same study; it does nothing once the study has ``n_trials`` trials.

    Args:
        template:
            ``"dnn"``: a multilayer perceptron on a table; ``"gpt"``: a small language model on a
            text.
        X:
            For ``"gpt"`` a text, the path of a file or folder, or a list of these; Python's own
            documentation if None. Otherwise a numpy array, pandas frame, torch tensor, or the
            path of a CSV file. With ``network``, an array or tensor of any number of dimensions
            is used as it is.
        y:
            Target to predict. For a CSV file, pass ``target`` instead.
        network:
            A function of your own from a mapping of parameters to a `torch.nn.Module`; replaces
            ``template``. ``space`` then also contains your parameters. See
            `templates.CustomNetworkTemplate`.
        target:
            Column of the CSV file to predict.
        task:
            ``"classification"``, ``"binary"``, ``"multiclass"`` or ``"regression"``; inferred
            from the target if None.
        validation:
            Fraction of the rows on which trials are evaluated (stratified for classes; 0.2 if
            None), or ``(X, y)``. For a text, the fraction at its end (0.1 if None), or another
            text or path.
        metric:
            ``"accuracy"`` (default for classes), ``"balanced_accuracy"``, ``"roc_auc"``,
            ``"log_loss"``, ``"f1"``; ``"rmse"`` (default for numbers), ``"mae"``, ``"r2"``; or a
            function ``f(y_true, y_pred)``, which is maximized unless ``direction`` says
            otherwise. Language models are always evaluated by bits per byte.
        direction:
            ``"maximize"`` or ``"minimize"``; that of the metric if None.
        errors:
            How bytes of a text file that are not UTF-8 are handled: ``"strict"`` (an error),
            ``"replace"`` or ``"ignore"``.
        preset:
            A published GPT to start from, scaled to a CPU; see `preset`.
        space:
            Distributions by name. They replace those of the catalogue, or add your own
            parameters. A space from `zoom` also starts the study with the source study's best
            configuration.
        fixed:
            Values by name that are not tuned.
        n_trials:
            Number of trials of the whole study, including those of earlier calls.
        timeout:
            Seconds that this call may take. Running trials stop within one training step.
        method:
            ``"grid"``, ``"random"``, ``"quasi-random"``, ``"zoom"``, ``"bayes"``, ``"bayes-gp"``,
            ``"gradient"``, ``"evolution"`` or ``"population"``, see `search.methods.METHODS`; or
            an Optuna sampler.
        method_options:
            Options of the method: ``partial`` (grid: try the part that fits into the budget);
            ``round_size``, ``patience`` (zoom); ``n_startup_trials`` (bayes); ``starts``,
            ``rate`` (gradient); ``population_size`` (evolution); ``size``, ``generations``
            (population).
        levels:
            Values by name for a grid; parameters without values keep their default. If None, the
            catalogue's values of all tuned parameters.
        replicates:
            How often each of the best five configurations is retrained with other seeds, within
            the timeout. The best trial is then the one with the best mean, see
            `Result.replicates`. None for no replicates.
        sampler:
            An Optuna sampler; the same as passing it as ``method``. With ``"gradient"`` and
            ``"population"`` it proposes the parameters that these methods do not set.
        pruner:
            An Optuna pruner, which is asked after each evaluation of a trial. If None,
            successive halving of whole cohorts; `optuna.pruners.NopPruner` for no pruning. Not
            allowed with ``"gradient"`` and ``"population"``, which do not prune.
        storage:
            Path of a journal file, URL (``"sqlite:///study.db"``), Optuna storage, or None to
            keep the study in memory. Other processes see running trials with a delay of at most
            two seconds.
        study_name:
            Name of the study; made of the template, the metric and the data if None.
        callbacks:
            Functions called with the study and the trial after each trial, as in Optuna. After
            ``study.stop()`` the running trials still finish.
        show_progress_bar:
            Whether to show a progress bar.
        cohort_size:
            Number of trials trained at once. If None, the fastest number that fits into half of
            the free memory; it is measured once per network shape.
        seed:
            Seed of all random numbers. With one worker, the same seed and ``n_trials`` give the
            same study if the cohort sizes are the same. Measured sizes can differ between
            machines.
        device:
            Device to train on; if None a CUDA GPU if there is one, else the CPU.
        compile:
            Whether to use `torch.compile`, which takes seconds to minutes per network shape. It
            pays off for long trials of large networks. It has no effect on the templates'
            networks on a CPU, which the compiled engine trains.
        checkpoint_every:
            Seconds between checkpoints of the running trials, which are stored beside the
            study's file: after a kill, the same call resumes them. Checkpoints take at most 2 %
            of the time. None for no checkpoints.
        trial_timeout:
            Seconds of training that a trial may take, together with its cohort; it then ends with
            its current value. Checked after each evaluation, and at each step of networks that
            torch trains.
        workers:
            Number of processes that work on the study, on this machine unless there is an
            ``executor``. They share torch's threads. A worker that dies is replaced and its
            trials are resumed.
        executor:
            Where the workers run: any object with ``submit`` as in PEP 3148, such as the
            executors of concurrent.futures, Dask, submitit or mpi4py. The ``timeout`` of a worker
            begins when the worker starts, and ``callbacks`` are called in it. See the guide
            on many workers.

    Returns:
        The best model and the study.

    Shape:
        - X: ``(rows, columns)``, or with ``network`` ``(rows, ...)``; y: ``(rows,)``.

    Raises:
        ValueError: If the data or an argument is not valid; nothing has been trained then.
        FileNotFoundError: If a file does not exist.

    Example:
        >>> from sklearn.datasets import load_iris
        >>> X, y = load_iris(return_X_y=True)
        >>> fixed = {"epochs": 10}
        >>> result = optimize("dnn", X, y, n_trials=3, storage=None, fixed=fixed)
        >>> len(result.study.trials)
        3
    """
    workers = _as_count("workers", workers)
    n_trials = _as_optional_count("n_trials", n_trials)
    cohort_size = _as_optional_count("cohort_size", cohort_size)
    replicates = _as_optional_count("replicates", replicates)
    timeout = _as_seconds("timeout", timeout)
    checkpoint_every = _as_seconds("checkpoint_every", checkpoint_every)
    trial_timeout = _as_seconds("trial_timeout", trial_timeout)
    _check_study_arguments(n_trials, timeout, study_name, callbacks, pruner)
    check_seed(seed)
    if workers > 1 or executor is not None:
        check_workers(executor, storage)
    method_config = parse_method(method, sampler, method_options, levels, seed)
    method_config.reject_options(
        pruner=None if isinstance(pruner, NopPruner) else pruner,
        cohort_size=cohort_size,
        trial_timeout=trial_timeout,
    )
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
    tuner_options = {
        "cohort_size": cohort_size,
        "kept": MAX_CONFIGURATIONS if replicates else 1,
        "checkpoint_every": checkpoint_every,
        "trial_timeout": trial_timeout,
    }
    config = WorkerConfig(
        problem_spec,
        storage,
        study_name or "",
        method_config,
        pruner,
        n_trials,
        tuner_options=tuner_options,
        callbacks=tuple(callbacks or ()),
        n_workers=workers,
    )
    return _run_study(config, Budget(n_trials, timeout), replicates, executor, show_progress_bar)


def _run_study(
    config: WorkerConfig,
    budget: Budget,
    replicates: int | None,
    executor: Executor | None,
    show_progress_bar: bool,
) -> Result:
    """Open the study and run it in this process or by workers."""
    problem = config.problem_spec.problem_without_gpu_claim()
    config.method_config.check(problem, budget)
    study, weights = _open_study_and_weights(problem, config)
    config = replace(config, study_name=study.study_name, weights_folder=weights.folder)
    config.store_in(study)
    trainer = ReplicateTrainer(problem, replicates, budget) if replicates else None
    uses_workers = executor is not None or config.n_workers > 1
    if uses_workers:
        run_workers(config, study, problem, budget, executor, show_progress_bar=show_progress_bar)
        # A new object, since the workers have written files to the folder.
        all_weights = BestWeights(weights.folder)
        keep_best_weights(study, all_weights, config.tuner_options["kept"], problem.maximize)
    problem = config.problem_spec.problem_on_free_device(study, problem)
    callbacks = config.callbacks
    if trainer is not None:
        trainer.set_problem(problem)
        callbacks = (*callbacks, trainer)
    if not uses_workers:
        config.make_tuner(
            study, problem, budget, weights, callbacks, show_progress_bar=show_progress_bar
        ).run()
    if trainer is not None:
        trainer.run(study, is_late=executor is not None)
    result = Result(without_cache(study), problem, weights)
    result.store_generated_text()
    return result


def _open_study_and_weights(problem: Template, config: WorkerConfig) -> tuple[Study, BestWeights]:
    """Create or load the study, and return it with the weights of its best trials."""
    storage, method = config.storage, config.method_config
    opened = open_storage(storage)
    pruner = config.pruner or CohortHalvingPruner(min_resource=problem.min_resource)
    study = open_study(problem, opened, config.study_name, method.sampler, pruner)
    if storage is not None:
        is_named = isinstance(storage, str | Path)
        location = hide_passwords(str(storage), storage) if is_named else "the given storage"
        _logger.info(f"Storing the study {study.study_name!r} in {location}.")
    enqueue_best_of_source_study(study, config.problem_spec.space, problem)
    # The seed of the method's sampler depends on the trials that the study has already.
    study = optuna.load_study(
        study_name=study.study_name,
        storage=storage_of(study),
        sampler=method.sampler_for(study, few=problem.sequential),
        pruner=pruner,
    )
    folder = models_folder(opened, None if isinstance(storage, BaseStorage) else storage)
    return study, BestWeights(folder / study.user_attrs[MODELS] if folder else None)


def _as_count(name: str, count: Any) -> int:
    """Return a positive integer, also of NumPy, as an int; raise for anything else."""
    if not _is_number(count, Integral) or count < 1:
        raise ValueError(f"`{name}` must be at least 1, but got {short_repr(count)}.")
    return int(count)


def _as_optional_count(name: str, count: Any) -> int | None:
    """Return a positive integer as an int, and None as it is; raise for anything else."""
    return None if count is None else _as_count(name, count)


def _as_seconds(name: str, seconds: Any) -> float | None:
    """Return a positive duration as a float, and None as it is; raise for anything else."""
    if seconds is None:
        return None
    if not (_is_number(seconds, Real) and seconds > 0):
        raise ValueError(f"`{name}` must be more than 0 seconds, but got {short_repr(seconds)}.")
    return float(seconds)


def _check_study_arguments(
    n_trials: Any, timeout: Any, study_name: Any, callbacks: Any, pruner: Any
) -> None:
    """Raise if the study has no limit, or an argument of Optuna's has the wrong type."""
    if n_trials is None and timeout is None:
        raise ValueError("`n_trials` or `timeout` must be given, but both are None.")
    if study_name is not None and not isinstance(study_name, str):
        raise ValueError(f"`study_name` must be a text, but got {short_repr(study_name)}.")
    if callbacks is not None and not isinstance(callbacks, Sequence):
        raise ValueError(
            f"`callbacks` must be a list of functions, but got {short_repr(callbacks)}."
        )
    if pruner is not None and not isinstance(pruner, BasePruner):
        raise ValueError(f"`pruner` must be an Optuna pruner, but got {short_repr(pruner)}.")


def _is_number(value: object, kind: type) -> bool:
    """Return whether a value is a number of some kind; a bool is none."""
    return isinstance(value, kind) and not isinstance(value, bool)
