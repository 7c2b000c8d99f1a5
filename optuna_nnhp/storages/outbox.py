"""What could not be written before the end: one file beside the study, and its replay."""

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

from optuna_nnhp.storages.operations import WORKER
from optuna_nnhp.storages.operations import Batch
from optuna_nnhp.storages.operations import Change
from optuna_nnhp.training.weight_files import write_atomically

if TYPE_CHECKING:
    from optuna_nnhp.storages.buffered import BufferedStorage
    from optuna_nnhp.storages.ledger import View

_logger = optuna.logging.get_logger(f"optuna.{__name__}")

VERSION = 1  # of the file
LONGEST_NAME = 100  # letters of a worker's name that are in the file's


@dataclass
class Unsent:
    """What one study has not got yet.

    Args:
        changes:
            Of its trials, by number.
        attributes:
            Of itself, by kind ("user" or "system") and key.
    """

    changes: dict[int, Change] = field(default_factory=dict)
    attributes: dict[tuple[str, str], Any] = field(default_factory=dict)


def path_of(folder: Path, worker: str) -> Path:
    """The file of one worker.

    Example:
        >>> path_of(Path("a.models"), "host:17/../x").name
        'outbox-host_17_.._x.json'
    """
    plain = re.sub(r"[^\w.-]+", "_", worker)[:LONGEST_NAME]
    return folder / f"outbox-{plain}.json"


def keep(folder: Path, worker: str, studies: Mapping[str, Unsent]) -> Path:
    """Write a file, whole or not at all.

    Args:
        folder:
            Where; it is made.
        worker:
            Who could not write.
        studies:
            What, by study name.

    Returns:
        The file.

    Raises:
        OSError: If it cannot be written.
    """
    content = {
        "version": VERSION,
        "worker": worker,
        "studies": {name: _as_json(unsent) for name, unsent in studies.items()},
    }
    path = path_of(folder, worker)
    write_atomically(
        path, json.dumps({"content": content, "checksum": _checksum(content)}, indent=1)
    )
    return path


def load(path: Path) -> tuple[str, dict[str, Unsent]]:
    """Read what `keep` wrote.

    Returns:
        The worker, and what it could not write, by study name.

    Raises:
        OSError: If there is no such file.
        ValueError: If it is damaged.
    """
    try:
        whole = json.loads(path.read_text(encoding="utf-8"))
        content = whole["content"]
        if whole["checksum"] != _checksum(content):
            raise ValueError("its checksum is another one")
        if content["version"] != VERSION:
            raise ValueError(f"its version is {content['version']}")
        studies = {name: _from_json(unsent) for name, unsent in content["studies"].items()}
        return str(content["worker"]), studies
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{path} must be a whole file of version {VERSION}, but is damaged: {error}"
        raise ValueError(reason) from error


def replay_outbox(storage: BufferedStorage, folder: Path) -> int:
    """Write what earlier runs could not, and delete their files.

    What belongs to studies of other storages stays. A trial that has ended meanwhile, or that
    another worker has taken over, stays as it is, and a warning says so.

    Args:
        storage:
            The storage.
        folder:
            Where `BufferedStorage.save_outbox` put the files.

    Returns:
        How many trials have been changed.

    Raises:
        ValueError: If a file is damaged; it stays, and all others have been replayed.
        StorageUnavailable: If the storage does not answer; the files stay.
    """
    count, damage = 0, None
    for path in sorted(folder.glob("outbox-*.json")):
        try:
            worker, studies = load(path)
        except FileNotFoundError:  # another process has replayed it
            continue
        except ValueError as error:
            damage = error
            continue
        is_whole = True
        for name, unsent in studies.items():
            try:
                study_id = storage.get_study_id_from_name(name)
            except KeyError:
                is_whole = False
                continue
            count += _replay(storage, study_id, worker, unsent)
        if is_whole:
            path.unlink(missing_ok=True)
    if damage is not None:
        raise damage
    return count


def _replay(storage: BufferedStorage, study_id: int, worker: str, unsent: Unsent) -> int:
    """Write what one study has not got; how many of its trials have changed."""
    ledger = storage._ledger
    with storage._lock:
        view = storage._known(study_id)
        ledger.sync(view)
        changes, refused = dict[int, Change](), dict[int, str]()
        for number, change in unsent.changes.items():
            if (reason := _refusal(view, number, worker, change)) is not None:
                refused[number] = reason
            else:
                changes[view.trials[number]._trial_id] = change
        if changes:
            batch = Batch(changes=changes)
            written = ledger.reach.ask(lambda: ledger.writer.write(batch), writes=True)
            for trial_id, error in written.refused.items():
                if not ledger.is_written(trial_id, changes[trial_id]):
                    refused[ledger.homes[trial_id][1]] = str(error)
        for number, reason in refused.items():
            if reason:
                _logger.warning(f"What {worker} did in trial {number} is lost: {reason}.")
        storage.notes |= {(study_id, *key): value for key, value in unsent.attributes.items()}
        storage.send_notes()
        storage.refresh()
    return len(unsent.changes) - len(refused)


def _refusal(view: View, number: int, worker: str, change: Change) -> str | None:
    """Why a trial cannot change so; an empty text if it is so already, None if it can."""
    if number >= len(view.trials):
        return "it does not exist"
    trial = view.trials[number]
    if trial.state.is_finished():
        is_same = (trial.state, trial.values) == (change.state, change.values)
        return "" if is_same else f"it is {trial.state.name} already"
    owner = trial.user_attrs.get(WORKER)
    return None if owner in (None, worker) else f"{owner} has taken it over"


def _as_json(unsent: Unsent) -> dict[str, Any]:
    """What JSON can keep of it: numbers are as they are, also those that are none."""
    trials = {
        str(number): {
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
        for number, change in unsent.changes.items()
    }
    attributes = [[*key, value] for key, value in unsent.attributes.items()]
    return {"trials": trials, "attributes": attributes}


def _from_json(unsent: Mapping[str, Any]) -> Unsent:
    changes = {int(number): _change(change) for number, change in unsent["trials"].items()}
    attributes = {(_kind(kind), str(key)): value for kind, key, value in unsent["attributes"]}
    return Unsent(changes, attributes)


def _change(change: Mapping[str, Any]) -> Change:
    state = None if change["state"] is None else TrialState[change["state"]]
    completed = _local(change["completed"]) if change["completed"] else None
    if state is not None and state.is_finished() and completed is None:
        raise ValueError("a trial has ended without a time")  # no journal could be read any more
    return Change(
        params={
            name: (float(value), json_to_distribution(text))
            for name, (value, text) in change["params"].items()
        },
        user_attrs=dict(change["user_attrs"]),
        system_attrs=dict(change["system_attrs"]),
        intermediate_values={
            int(step): float(value) for step, value in change["intermediate_values"]
        },
        state=state,
        values=change["values"] and [float(value) for value in change["values"]],
        completed=completed,
    )


def _kind(kind: str) -> str:
    if kind not in ("user", "system"):
        raise ValueError(f"{kind!r} is no kind of attribute")
    return kind


def _local(text: str) -> datetime:
    return datetime.fromisoformat(text).astimezone().replace(tzinfo=None)


def _checksum(content: Any) -> str:
    text = json.dumps(json.loads(json.dumps(content)), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
