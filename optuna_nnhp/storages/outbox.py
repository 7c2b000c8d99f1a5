"""Files with the operations that a worker could not write before its end, and their replay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field
from datetime import UTC
from datetime import datetime
import hashlib
import json
from pathlib import Path
import re
from typing import TYPE_CHECKING
from typing import Any

import optuna
from optuna.distributions import distribution_to_json
from optuna.distributions import json_to_distribution
from optuna.trial import TrialState

from optuna_nnhp.storages.lease import is_worker_alive
from optuna_nnhp.storages.operations import Applied
from optuna_nnhp.storages.operations import Op
from optuna_nnhp.storages.operations import Operation
from optuna_nnhp.storages.operations import StudyAttr
from optuna_nnhp.storages.operations import TrialChange
from optuna_nnhp.training.weight_files import write_atomically

if TYPE_CHECKING:
    from optuna_nnhp.storages.buffered import BufferedStorage

_logger = optuna.logging.get_logger(f"optuna.{__name__}")

VERSION = 2  # of the file's format
MAX_NAME_LENGTH = 100  # letters of a worker's name in the file's name


@dataclass
class SavedOp:
    """An operation in an outbox.

    Args:
        study:
            Name of the study: its id may be another one in the next process.
        op:
            The operation.
        number:
            Number of its trial, None for an attribute of the study.
    """

    study: str
    op: Operation
    number: int | None = None


@dataclass
class Outbox:
    """The operations that a worker could not write, in their order.

    Args:
        worker:
            The worker.
        ops:
            The operations.
    """

    worker: str
    ops: list[SavedOp] = field(default_factory=list)


def outbox_path(folder: Path, worker: str) -> Path:
    """Return the file of a worker.

    Example:
        >>> outbox_path(Path("a.models"), "host:17/../x").name
        'outbox-host_17_.._x.json'
    """
    plain = re.sub(r"[^\w.-]+", "_", worker)[:MAX_NAME_LENGTH]
    return folder / f"outbox-{plain}.json"


def write_outbox(folder: Path, outbox: Outbox) -> Path:
    """Write a worker's file, whole or not at all.

    Args:
        folder:
            Folder of the file; it is made.
        outbox:
            What to write.

    Returns:
        The file.

    Raises:
        OSError: If it cannot be written.
    """
    content = {
        "version": VERSION,
        "worker": outbox.worker,
        "operations": [_to_json(saved) for saved in outbox.ops],
    }
    path = outbox_path(folder, outbox.worker)
    write_atomically(
        path, json.dumps({"content": content, "checksum": _checksum(content)}, indent=1)
    )
    return path


def read_outbox(path: Path) -> Outbox:
    """Read what `write_outbox` has written.

    Raises:
        OSError: If there is no such file.
        ValueError: If it is damaged.
    """
    try:
        whole = json.loads(path.read_text(encoding="utf-8"))
        content = whole["content"]
        if whole["checksum"] != _checksum(content):
            raise ValueError("its checksum is wrong")
        if content["version"] != VERSION:
            raise ValueError(f"its version is {content['version']}")
        worker = str(content["worker"])
        return Outbox(worker, [_from_json(saved, worker) for saved in content["operations"]])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{path} must be a whole file of version {VERSION}, but is damaged: {error}"
        raise ValueError(reason) from error


def replay_outbox(storage: BufferedStorage, folder: Path) -> int:
    """Write the operations of earlier processes' outboxes, and delete the files.

    A file of a worker that lives on this machine stays, and so does one with operations on studies
    of other storages. A trial that has ended meanwhile, or that another worker has taken over, is
    not changed, and a warning says so.

    Args:
        storage:
            The storage.
        folder:
            Folder of the files, as given to `BufferedStorage.save_outbox`.

    Returns:
        The number of trials that were changed.

    Raises:
        ValueError: If a file is damaged; it stays, and all others have been replayed.
        StorageUnavailable: If the storage does not answer; the files stay.
    """
    count, damage = 0, None
    for path in sorted(folder.glob("outbox-*.json")):
        try:
            outbox = read_outbox(path)
        except FileNotFoundError:  # another process has replayed it
            continue
        except ValueError as error:
            damage = error
            continue
        if is_worker_alive(outbox.worker):  # it writes them itself, perhaps has done so already
            continue
        is_whole = True
        for name in dict.fromkeys(saved.study for saved in outbox.ops):
            try:
                study_id = storage.get_study_id_from_name(name)
            except KeyError:
                is_whole = False
                continue
            ops = [saved for saved in outbox.ops if saved.study == name]
            count += _write_operations(storage, study_id, Outbox(outbox.worker, ops))
        if is_whole:
            path.unlink(missing_ok=True)
    if damage is not None:
        raise damage
    return count


def _write_operations(storage: BufferedStorage, study_id: int, outbox: Outbox) -> int:
    """Write the operations on one study; return how many trials were changed."""
    storage.refresh()
    found, lost = list[SavedOp](), dict[int, object]()
    for saved in outbox.ops:
        saved.op.study_id = study_id
        if isinstance(saved.op, Op) and saved.number is not None:
            try:
                number = saved.number
                trial_id = storage.get_trial_id_from_study_id_trial_number(study_id, number)
            except KeyError as error:
                lost[saved.number] = error.args[0]
                continue
            saved.op.trial_id = trial_id
        found.append(saved)
    outcomes = storage.write_ops([saved.op for saved in found])
    count = 0
    for saved, outcome in zip(found, outcomes, strict=True):
        if saved.number is None:
            continue
        if isinstance(outcome, Applied):
            count += not outcome.is_repeated
        else:
            lost[saved.number] = outcome
    for number, reason in lost.items():
        text = f"Discarded the changes of worker {outbox.worker} to trial {number}: {reason}"
        _logger.warning(text)
    return count


def _to_json(saved: SavedOp) -> dict[str, Any]:
    """Return an operation as JSON can keep it: with all numbers, also those that are NaN."""
    op = saved.op
    if isinstance(op, StudyAttr):
        return {"study": saved.study, "kind": op.kind, "key": op.key, "value": op.value}
    change = op.change
    return {
        "study": saved.study,
        "trial": saved.number,
        "token": op.token,
        "params": {
            name: [value, distribution_to_json(distribution)]
            for name, (value, distribution) in change.params.items()
        },
        "user_attrs": change.user_attrs,
        "system_attrs": change.system_attrs,
        "intermediate_values": list(change.intermediate_values.items()),
        "state": change.state and change.state.name,
        "values": change.values,
        "completed": change.completed and change.completed.astimezone(UTC).isoformat(),
    }


def _from_json(saved: Mapping[str, Any], worker: str) -> SavedOp:
    """Return an operation; only a trial that is the worker's or nobody's is changed."""
    study = str(saved["study"])
    if "kind" in saved:
        if saved["kind"] not in ("user", "system"):
            raise ValueError(f"{saved['kind']!r} is no kind of attribute")
        attr = StudyAttr(-1, saved["kind"], str(saved["key"]), saved["value"])
        return SavedOp(study, attr)
    change, token = _change_from_json(saved), str(saved["token"])
    op = Op(-1, -1, change, if_owner=(None, worker), token=token)
    return SavedOp(study, op, int(saved["trial"]))


def _change_from_json(saved: Mapping[str, Any]) -> TrialChange:
    state = None if saved["state"] is None else TrialState[saved["state"]]
    completed = _to_local_time(saved["completed"]) if saved["completed"] else None
    if state is not None and state.is_finished() and completed is None:
        raise ValueError("a trial has ended without a time")  # it would make a journal unreadable
    values = saved["intermediate_values"]
    return TrialChange(
        params={
            name: (float(value), json_to_distribution(text))
            for name, (value, text) in saved["params"].items()
        },
        user_attrs=dict(saved["user_attrs"]),
        system_attrs=dict(saved["system_attrs"]),
        intermediate_values={int(step): float(value) for step, value in values},
        state=state,
        values=saved["values"] and [float(value) for value in saved["values"]],
        completed=completed,
    )


def _to_local_time(text: str) -> datetime:
    return datetime.fromisoformat(text).astimezone().replace(tzinfo=None)


def _checksum(content: Any) -> str:
    text = json.dumps(json.loads(json.dumps(content)), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
