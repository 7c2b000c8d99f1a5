"""Applies operations to a database: one transaction, in which each table is written once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from datetime import UTC
from datetime import datetime
import json
import math
import time
from typing import Any

from optuna.distributions import BaseDistribution
from optuna.distributions import distribution_to_json
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial
from optuna.trial import TrialState
from sqlalchemy import Connection
from sqlalchemy import Table
from sqlalchemy import bindparam
from sqlalchemy import case
from sqlalchemy import func
from sqlalchemy import select
from sqlalchemy.dialects import mysql
from sqlalchemy.dialects import postgresql
from sqlalchemy.dialects import sqlite
from sqlalchemy.exc import SQLAlchemyError

from optuna_nnhp.storages._optuna_internals import id_of
from optuna_nnhp.storages._optuna_internals import load_tables
from optuna_nnhp.storages._optuna_internals import read_trials
from optuna_nnhp.storages._optuna_internals import stored_intermediate_value
from optuna_nnhp.storages._optuna_internals import stored_value
from optuna_nnhp.storages.operations import TOKEN
from optuna_nnhp.storages.operations import WORKER
from optuna_nnhp.storages.operations import Applied
from optuna_nnhp.storages.operations import Op
from optuna_nnhp.storages.operations import Operation
from optuna_nnhp.storages.operations import Outcome
from optuna_nnhp.storages.operations import PlannedWrites
from optuna_nnhp.storages.operations import StudyAttr
from optuna_nnhp.storages.operations import StudyCounts
from optuna_nnhp.storages.operations import TrialChange
from optuna_nnhp.storages.operations import TrialStatus
from optuna_nnhp.storages.operations import json_round_trip
from optuna_nnhp.storages.operations import plan_writes

Row = dict[str, Any]
DIALECTS = ("sqlite", "postgresql", "mysql", "mariadb")
TABLES = load_tables()
TRIALS = TABLES.trials
# Columns that make a row of a table unique.
UNIQUE_COLUMNS = (
    (TABLES.params, ("trial_id", "param_name")),
    (TABLES.system_attrs, ("trial_id", "key")),
    (TABLES.user_attrs, ("trial_id", "key")),
    (TABLES.intermediate_values, ("trial_id", "step")),
    (TABLES.values, ("trial_id", "objective")),
    (TABLES.study_user_attrs, ("study_id", "key")),
    (TABLES.study_system_attrs, ("study_id", "key")),
)
STUDY_ATTRS = {"user": TABLES.study_user_attrs, "system": TABLES.study_system_attrs}
FULL_READ_INTERVAL = 20  # durations of a full read, until running trials of others are read again
MAX_IDS = 500  # in one query: SQLite has had a limit of 999


class RdbAdapter:
    """Writes Optuna's tables directly, in one transaction for any number of operations.

    Optuna's own calls write one value each, with a transaction and several queries. Rows that
    exist are replaced, so that writing again after an error is harmless.

    Args:
        storage:
            The storage.
    """

    def __init__(self, storage: RDBStorage) -> None:
        self._storage = storage
        self._distributions_as_json: dict[int, tuple[BaseDistribution, str]] = {}  # by id
        self._full_read_at = -math.inf  # clock of the next reading of all unfinished trials
        self._states_read: dict[int, TrialState] = {}  # of other workers' trials, when last read

    def apply(self, ops: Sequence[Operation]) -> list[Outcome]:
        """Apply operations and commit them.

        Raises:
            StorageInternalError: If the database fails; nothing is written then.
        """
        try:
            with self._storage.engine.begin() as connection:
                if connection.dialect.name == "sqlite":  # else it locks at the first row it writes
                    connection.exec_driver_sql("BEGIN IMMEDIATE")
                outcomes = self._apply(connection, ops)
        except SQLAlchemyError as error:
            raise StorageInternalError(f"The database could not be written: {error}") from error
        if any(isinstance(op, Op) and op.if_owner is not None for op in ops):
            self._full_read_at = -math.inf  # the last owner's values of a takeover are needed
        return outcomes

    def _apply(self, connection: Connection, ops: Sequence[Operation]) -> list[Outcome]:
        # Studies are always locked before trials, so that no two transactions wait for each other.
        studies = _lock_studies(connection, ops)
        planned = plan_writes(ops, _lock_trials(connection, ops), studies)
        rows: dict[Table, list[Row]] = defaultdict(list)
        for attr in planned.study_attrs:
            row = {"study_id": attr.study_id, "key": attr.key}
            rows[STUDY_ATTRS[attr.kind]].append({**row, "value_json": json.dumps(attr.value)})
        changes = dict(planned.changes)
        if planned.new:
            ids = _create_trials(connection, planned)
            planned.set_ids(ids)
            changes |= {i: op.change_with_token for i, op in zip(ids, planned.new, strict=True)}
        self._write_rows(connection, changes, rows)
        _write_states(connection, planned.changes)
        return planned.outcomes

    def _write_rows(
        self,
        connection: Connection,
        changes: Mapping[int, TrialChange],
        rows: dict[Table, list[Row]],
    ) -> None:
        """Write parameters, attributes and values, each table with one statement."""
        for trial_id, change in changes.items():
            trial = {"trial_id": trial_id}
            rows[TABLES.params] += self._param_rows(trial, change)
            rows[TABLES.system_attrs] += _attr_rows(trial, change.system_attrs)
            rows[TABLES.user_attrs] += _attr_rows(trial, change.user_attrs)
            rows[TABLES.intermediate_values] += _report_rows(trial, change.intermediate_values)
            rows[TABLES.values] += _value_rows(trial, change.values or ())
        for table, unique in UNIQUE_COLUMNS:
            if rows[table]:
                _upsert(connection, table, unique, rows[table])

    def _param_rows(self, trial: Row, change: TrialChange) -> Iterator[Row]:
        for name, (value, distribution) in change.params.items():
            text = self._as_json(distribution)
            yield {**trial, "param_name": name, "param_value": value, "distribution_json": text}

    def _as_json(self, distribution: BaseDistribution) -> str:
        """Return a distribution as JSON; there are few of them, and many parameters."""
        known = self._distributions_as_json.get(id(distribution))
        if known is None:
            known = distribution, distribution_to_json(distribution)
            self._distributions_as_json[id(distribution)] = known
        return known[1]

    def read(self, study_id: int, unfinished: set[int], last_trial_id: int) -> list[FrozenTrial]:
        """Return the trials that may be new: the object-relational mapper takes 1 ms for one.

        Trials of other workers that have kept their state are read again so seldom that this takes
        a twentieth of the time: a thousand workers run thousands of trials.
        """
        began = time.monotonic()
        is_full = began >= self._full_read_at
        if not is_full:
            states, known = self._unfinished_states(study_id), self._states_read
            unfinished = {i for i in unfinished if i not in known or states.get(i) != known[i]}
        trials = read_trials(self._storage, study_id, unfinished, last_trial_id)
        if is_full:
            ended = time.monotonic()
            share = len(unfinished) / max(1, len(trials))  # new trials are read only once
            self._full_read_at = ended + FULL_READ_INTERVAL * (ended - began) * share
            self._states_read.clear()
        self._states_read.update((id_of(t), t.state) for t in trials)
        return trials

    def _unfinished_states(self, study_id: int) -> dict[int, TrialState]:
        unfinished = TRIALS.c.state.in_((TrialState.RUNNING, TrialState.WAITING))
        query = select(TRIALS.c.trial_id, TRIALS.c.state)
        with self._storage.engine.connect() as connection:
            rows = connection.execute(query.where(TRIALS.c.study_id == study_id, unfinished))
            return {row.trial_id: row.state for row in rows}

    def as_stored(self, value: Any) -> Any:
        """Return a value as JSON returns it."""
        return json_round_trip(value)


def _lock_studies(connection: Connection, ops: Sequence[Operation]) -> dict[int, StudyCounts]:
    """Find the studies of operations; those in which trials may start are locked until the end."""
    starting = {
        op.study_id
        for op in ops
        if isinstance(op, Op) and (op.trial_id is None or op.limit is not None)
    }
    studies = dict[int, StudyCounts]()
    for study_id in sorted(starting | {op.study_id for op in ops if isinstance(op, StudyAttr)}):
        query = select(TABLES.studies.c.study_id).where(TABLES.studies.c.study_id == study_id)
        query = query.with_for_update() if study_id in starting else query
        if connection.execute(query).first() is None:
            continue
        studies[study_id] = StudyCounts()
        if study_id in starting:
            begun = case((TRIALS.c.state != TrialState.WAITING, TRIALS.c.trial_id))
            counts = select(func.count(begun), func.count()).where(TRIALS.c.study_id == study_id)
            studies[study_id] = StudyCounts(*connection.execute(counts).one())
    return studies


def _lock_trials(connection: Connection, ops: Sequence[Operation]) -> dict[int, TrialStatus]:
    """Read the trials of operations, which stay so until the end of the transaction."""
    on_trials = [(op.trial_id, op) for op in ops if isinstance(op, Op) and op.trial_id is not None]
    states = dict[int, TrialState]()
    for some in _split_ids(sorted({i for i, _ in on_trials})):
        query = select(TRIALS.c.trial_id, TRIALS.c.state).where(TRIALS.c.trial_id.in_(some))
        query = query.order_by(TRIALS.c.trial_id).with_for_update()
        states.update({row.trial_id: row.state for row in connection.execute(query)})
    owned = {i for i, op in on_trials if op.if_owner is not None}
    owners = _read_attrs(connection, TABLES.user_attrs, WORKER, sorted(owned))
    # A token matters only where the operation may have been applied before.
    repeated = {i for i, op in on_trials if i in states and op.change.state == states[i]}
    tokens = _read_attrs(connection, TABLES.system_attrs, TOKEN, sorted(repeated))
    return {i: TrialStatus(s, owners.get(i), tokens.get(i)) for i, s in states.items()}


def _read_attrs(
    connection: Connection, table: Table, key: str, trial_ids: Sequence[int]
) -> dict[int, Any]:
    """Read an attribute of trials."""
    found = dict[int, Any]()
    for some in _split_ids(trial_ids):
        query = select(table.c.trial_id, table.c.value_json)
        rows = connection.execute(query.where(table.c.trial_id.in_(some), table.c.key == key))
        found.update({row.trial_id: json.loads(row.value_json) for row in rows})
    return found


def _split_ids(ids: Sequence[int]) -> Iterator[Sequence[int]]:
    for start in range(0, len(ids), MAX_IDS):
        yield ids[start : start + MAX_IDS]


def _create_trials(connection: Connection, planned: PlannedWrites) -> list[int]:
    """Insert trials into a study that is locked; return their ids."""
    numbers = [o.number for o in planned.outcomes if isinstance(o, Applied) and o.number >= 0]
    rows = [
        {
            "number": number,
            "study_id": op.study_id,
            "state": op.change.state,
            "datetime_start": _utc(op.change.started),
        }
        for number, op in zip(numbers, planned.new, strict=True)
    ]
    connection.execute(TRIALS.insert(), rows)
    (study_id,) = {op.study_id for op in planned.new}
    query = select(TRIALS.c.trial_id).where(TRIALS.c.study_id == study_id)
    query = query.where(TRIALS.c.number >= numbers[0]).order_by(TRIALS.c.number)
    return list(connection.execute(query).scalars())


def _write_states(connection: Connection, changes: Mapping[int, TrialChange]) -> None:
    """Write the states and times of trials that exist."""
    for column, starts in (("datetime_start", True), ("datetime_complete", False)):
        rows = [
            {
                "id": trial_id,
                "new": change.state,
                "time": _utc(change.started if starts else change.completed),
            }
            for trial_id, change in changes.items()
            if change.state is not None and (change.state == TrialState.RUNNING) == starts
        ]
        if rows:
            update = TRIALS.update().where(TRIALS.c.trial_id == bindparam("id"))
            values: Row = {"state": bindparam("new"), column: bindparam("time")}
            connection.execute(update.values(values), rows)


def _upsert(
    connection: Connection, table: Table, unique: tuple[str, ...], rows: list[Row]
) -> None:
    """Insert rows, or replace those that exist."""
    columns = [name for name in rows[0] if name not in unique]
    if connection.dialect.name in ("mysql", "mariadb"):
        into = mysql.insert(table)
        replaced = {name: into.inserted[name] for name in columns}
        connection.execute(into.on_duplicate_key_update(replaced), rows)
        return
    insert = sqlite.insert if connection.dialect.name == "sqlite" else postgresql.insert
    add = insert(table)
    change = {name: add.excluded[name] for name in columns}
    connection.execute(add.on_conflict_do_update(index_elements=unique, set_=change), rows)


def _attr_rows(trial: Row, attributes: Mapping[str, Any]) -> Iterator[Row]:
    for key, value in attributes.items():
        yield {**trial, "key": key, "value_json": json.dumps(value)}


def _report_rows(trial: Row, values: Mapping[int, float]) -> Iterator[Row]:
    for step, value in values.items():
        number, kind = stored_intermediate_value(value)
        columns = {"intermediate_value": number, "intermediate_value_type": kind}
        yield {**trial, "step": step, **columns}


def _value_rows(trial: Row, values: Sequence[float]) -> Iterator[Row]:
    for objective, value in enumerate(values):
        number, kind = stored_value(value)
        yield {**trial, "objective": objective, "value": number, "value_type": kind}


def _utc(time: datetime | None) -> datetime | None:
    return time.astimezone(UTC).replace(tzinfo=None) if time else None
