"""How a database of Optuna takes many changes of many trials: as one transaction."""

from __future__ import annotations

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
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial
from optuna.trial import TrialState
from sqlalchemy import Connection
from sqlalchemy import Table
from sqlalchemy import bindparam
from sqlalchemy import func
from sqlalchemy import select
from sqlalchemy.dialects import mysql
from sqlalchemy.dialects import postgresql
from sqlalchemy.dialects import sqlite
from sqlalchemy.exc import SQLAlchemyError

from optuna_nnhp.storages.operations import WORKER
from optuna_nnhp.storages.operations import Batch
from optuna_nnhp.storages.operations import Change
from optuna_nnhp.storages.operations import TrialTakenOver
from optuna_nnhp.storages.operations import Written
from optuna_nnhp.storages.operations import json_copy

Row = dict[str, Any]
DIALECTS = ("sqlite", "postgresql", "mysql", "mariadb")

STUDIES: Table = models.StudyModel.__table__
TRIALS: Table = models.TrialModel.__table__
PARAMS: Table = models.TrialParamModel.__table__
VALUES: Table = models.TrialValueModel.__table__
REPORTS: Table = models.TrialIntermediateValueModel.__table__
USER_ATTRS: Table = models.TrialUserAttributeModel.__table__
SYSTEM_ATTRS: Table = models.TrialSystemAttributeModel.__table__
# What else than the trial makes a row of a table unique.
KEYS = (
    (PARAMS, "param_name"),
    (SYSTEM_ATTRS, "key"),
    (USER_ATTRS, "key"),
    (REPORTS, "step"),
    (VALUES, "objective"),
)
SELDOM = 20  # times as long as it takes to read what others run, until it is read again
MOST = 500  # ids in one question: SQLite has had a limit of 999


class RdbAdapter:
    """A database: one transaction, in which every table is written once.

    What Optuna's own calls write one by one, each with a transaction and several questions, goes
    through the same tables. Rows that are there already are replaced, so that writing again
    after an error is harmless.

    Args:
        storage:
            The storage.
    """

    def __init__(self, storage: RDBStorage) -> None:
        self._storage = storage
        self._texts: dict[int, tuple[BaseDistribution, str]] = {}  # by id
        # Of other trials: when all are read again, and the states they were in.
        self._again, self._seen = -math.inf, dict[int, TrialState]()

    def write(self, batch: Batch) -> Written:
        """Write the batch and commit it.

        Raises:
            StorageInternalError: If the database fails; nothing is written then.
        """
        written = Written()
        try:
            with self._storage.engine.begin() as connection:
                if connection.dialect.name == "sqlite":  # else it locks at the first row it writes
                    connection.exec_driver_sql("BEGIN IMMEDIATE")
                # Always the study first, so that no two wait for each other.
                begun = _begun(connection, batch) if batch.claims or batch.templates else 0
                self._write_changes(connection, batch, written)
                self._start(connection, batch, begun, written)
        except SQLAlchemyError as error:
            raise StorageInternalError(f"The database could not be written: {error}") from error
        if batch.takes:  # what their last owner wrote is wanted, too
            self._again = -math.inf
        return written

    def _write_changes(self, connection: Connection, batch: Batch, written: Written) -> None:
        """Write what has changed of the trials that are still running, and take others over."""
        changes = batch.changes
        states = _states(connection, sorted({*changes, *batch.takes}))
        owners = _owners(connection, list(changes)) if batch.owner is not None else {}
        for trial_id in changes:
            state = states.get(trial_id)
            owner = owners.get(trial_id, batch.owner)
            if state is None:
                written.refused[trial_id] = KeyError(f"There is no trial with the id {trial_id}.")
            elif state.is_finished():
                text = f"The trial with the id {trial_id} is {state.name} already."
                written.refused[trial_id] = UpdateFinishedTrialError(text)
            elif owner not in (None, batch.owner):
                written.refused[trial_id] = TrialTakenOver(trial_id, owner)
        if batch.takes:
            owners = _owners(connection, list(batch.takes))
            written.taken = [
                trial_id
                for trial_id, owner in batch.takes.items()
                if states.get(trial_id) == TrialState.RUNNING
                and owners.get(trial_id) in (owner, batch.mark[WORKER])
            ]
        left = {i: change for i, change in changes.items() if i not in written.refused}
        marks = {trial_id: Change(user_attrs=dict(batch.mark)) for trial_id in written.taken}
        self._write_rows(connection, left | marks)
        ends = [
            {
                "id": trial_id,
                "new": change.state,
                "end": change.completed and _utc(change.completed),
            }
            for trial_id, change in left.items()
            if change.state is not None
        ]
        if ends:
            update = TRIALS.update().where(TRIALS.c.trial_id == bindparam("id"))
            update = update.values(state=bindparam("new"), datetime_complete=bindparam("end"))
            connection.execute(update, ends)

    def _write_rows(self, connection: Connection, changes: Mapping[int, Change]) -> None:
        """Write parameters, attributes and values: each table once."""
        rows: dict[Table, list[Row]] = {table: [] for table, _ in KEYS}
        for trial_id, change in changes.items():
            head = {"trial_id": trial_id}
            rows[PARAMS] += (
                {
                    **head,
                    "param_name": name,
                    "param_value": value,
                    "distribution_json": self._text(distribution),
                }
                for name, (value, distribution) in change.params.items()
            )
            rows[SYSTEM_ATTRS] += _attribute_rows(head, change.system_attrs)
            rows[USER_ATTRS] += _attribute_rows(head, change.user_attrs)
            rows[REPORTS] += _report_rows(head, change.intermediate_values)
            rows[VALUES] += _value_rows(head, change.values or ())
        for table, key in KEYS:
            if rows[table]:
                _put_rows(connection, table, key, rows[table])

    def _text(self, distribution: BaseDistribution) -> str:
        """A distribution as JSON; there are few of them, and many parameters."""
        known = self._texts.get(id(distribution))
        if known is None:
            known = self._texts[id(distribution)] = (
                distribution,
                distribution_to_json(distribution),
            )
        return known[1]

    def _start(self, connection: Connection, batch: Batch, begun: int, written: Written) -> None:
        """Claim and create trials while there is room."""
        room = batch.room(begun)
        for trial_id in batch.claims:
            if room > len(written.claimed) and _claim(connection, trial_id, batch.now):
                written.claimed.append(trial_id)
        if written.claimed and batch.mark:
            marks = {i: Change(user_attrs=dict(batch.mark)) for i in written.claimed}
            self._write_rows(connection, marks)
        _, templates = batch.possible(room - len(written.claimed), ())
        if templates:
            written.created = self._create(connection, batch.study_id, templates)

    def _create(
        self, connection: Connection, study_id: int, templates: Sequence[FrozenTrial]
    ) -> list[tuple[int, int]]:
        """Insert trials, and number them while nobody else can insert any into the study."""
        ids: list[int] = []
        for template in templates:
            start = _utc(template.datetime_start)
            row = {"study_id": study_id, "state": template.state, "datetime_start": start}
            key = connection.execute(TRIALS.insert().values(row)).inserted_primary_key
            assert key is not None
            ids.append(key[0])
        same = TRIALS.c.study_id == study_id
        before = select(func.count()).where(same, TRIALS.c.trial_id < ids[0])
        first = connection.execute(before).scalar_one()
        numbers = [{"id": i, "new": first + place} for place, i in enumerate(ids)]
        update = TRIALS.update().where(TRIALS.c.trial_id == bindparam("id"))
        connection.execute(update.values(number=bindparam("new")), numbers)
        attributes = {
            i: Change(user_attrs=template.user_attrs, system_attrs=template.system_attrs)
            for i, template in zip(ids, templates, strict=True)
        }
        self._write_rows(connection, attributes)
        return [(i, first + place) for place, i in enumerate(ids)]

    def read(self, study_id: int, unfinished: set[int], after: int) -> list[FrozenTrial]:
        """Only what may be new: an object-relational mapper takes 1 ms for a trial.

        Others' trials that are in the state they were in are read again so seldom that it takes
        a twentieth of the time: a thousand workers run thousands of them.
        """
        began = time.monotonic()
        is_whole = began >= self._again
        if not is_whole:
            states = self._unfinished(study_id)
            seen = self._seen
            unfinished = {i for i in unfinished if i not in seen or states.get(i) != seen[i]}
        trials = self._storage._get_trials(study_id, None, unfinished, after)
        if is_whole:
            ended = time.monotonic()
            share = len(unfinished) / max(1, len(trials))  # the rest is new, and read once
            self._again = ended + SELDOM * (ended - began) * share
            self._seen.clear()
        self._seen.update((t._trial_id, t.state) for t in trials)
        return trials

    def _unfinished(self, study_id: int) -> dict[int, TrialState]:
        """States of a study's trials that run or wait, by id."""
        going_on = TRIALS.c.state.in_((TrialState.RUNNING, TrialState.WAITING))
        question = select(TRIALS.c.trial_id, TRIALS.c.state)
        with self._storage.engine.connect() as connection:
            rows = connection.execute(question.where(TRIALS.c.study_id == study_id, going_on))
            return {row.trial_id: row.state for row in rows}

    def frozen(self, value: Any) -> Any:
        """The value after a way through JSON."""
        return json_copy(value)


def _states(connection: Connection, ids: Sequence[int]) -> dict[int, TrialState]:
    """States of trials, which stay so until the end of the transaction."""
    states: dict[int, TrialState] = {}
    for start in range(0, len(ids), MOST):
        some = TRIALS.c.trial_id.in_(ids[start : start + MOST])
        question = select(TRIALS.c.trial_id, TRIALS.c.state).where(some)
        question = question.order_by(TRIALS.c.trial_id).with_for_update()
        states.update({row.trial_id: row.state for row in connection.execute(question)})
    return states


def _owners(connection: Connection, ids: Sequence[int]) -> dict[int, Any]:
    """Who has trials that `_states` keeps as they are."""
    owners: dict[int, Any] = {}
    for start in range(0, len(ids), MOST):
        some = USER_ATTRS.c.trial_id.in_(ids[start : start + MOST])
        question = select(USER_ATTRS.c.trial_id, USER_ATTRS.c.value_json)
        rows = connection.execute(question.where(some, USER_ATTRS.c.key == WORKER))
        owners.update({row.trial_id: json.loads(row.value_json) for row in rows})
    return owners


def _begun(connection: Connection, batch: Batch) -> int:
    """How many trials have begun, if that matters; no other can until the transaction's end."""
    if batch.templates or batch.most is not None:
        study = select(STUDIES.c.study_id).where(STUDIES.c.study_id == batch.study_id)
        if connection.execute(study.with_for_update()).first() is None:
            raise KeyError(f"There is no study with the id {batch.study_id}.")
    if batch.most is None:
        return 0
    same = TRIALS.c.study_id == batch.study_id
    begun = select(func.count()).where(same, TRIALS.c.state != TrialState.WAITING)
    return connection.execute(begun).scalar_one()


def _claim(connection: Connection, trial_id: int, now: datetime) -> bool:
    """Start a WAITING trial, unless another process is the first to do so."""
    waiting = TRIALS.c.trial_id == trial_id, TRIALS.c.state == TrialState.WAITING
    started = {"state": TrialState.RUNNING, "datetime_start": _utc(now)}
    return connection.execute(TRIALS.update().where(*waiting).values(started)).rowcount == 1


def _put_rows(connection: Connection, table: Table, key: str, rows: list[Row]) -> None:
    """Insert rows, or replace those that are there."""
    new = [name for name in rows[0] if name not in ("trial_id", key)]
    if connection.dialect.name in ("mysql", "mariadb"):
        into = mysql.insert(table)
        replaced = {name: into.inserted[name] for name in new}
        connection.execute(into.on_duplicate_key_update(replaced), rows)
        return
    insert = sqlite.insert if connection.dialect.name == "sqlite" else postgresql.insert
    add = insert(table)
    change = {name: add.excluded[name] for name in new}
    connection.execute(
        add.on_conflict_do_update(index_elements=["trial_id", key], set_=change), rows
    )


def _attribute_rows(head: Row, attributes: Mapping[str, Any]) -> Iterator[Row]:
    for key, value in attributes.items():
        yield {**head, "key": key, "value_json": json.dumps(value)}


def _report_rows(head: Row, values: Mapping[int, float]) -> Iterator[Row]:
    stored = models.TrialIntermediateValueModel.intermediate_value_to_stored_repr
    for step, value in values.items():
        number, kind = stored(value)
        yield {
            **head,
            "step": step,
            "intermediate_value": number,
            "intermediate_value_type": kind,
        }


def _value_rows(head: Row, values: Sequence[float]) -> Iterator[Row]:
    for objective, value in enumerate(values):
        number, kind = models.TrialValueModel.value_to_stored_repr(value)
        yield {**head, "objective": objective, "value": number, "value_type": kind}


def _utc(time: datetime | None) -> datetime | None:
    return time.astimezone(UTC).replace(tzinfo=None) if time else None
