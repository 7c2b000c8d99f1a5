"""From tables to arrays: reading, checking, splitting, preprocessing."""

from __future__ import annotations

from optuna_nnhp.data.columns import MAX_CATEGORIES as MAX_CATEGORIES
from optuna_nnhp.data.frames import as_frame as as_frame
from optuna_nnhp.data.frames import as_target as as_target
from optuna_nnhp.data.frames import check_lengths as check_lengths
from optuna_nnhp.data.frames import read_csv as read_csv
from optuna_nnhp.data.preprocessor import Preprocessor as Preprocessor
from optuna_nnhp.data.splits import batch_order as batch_order
from optuna_nnhp.data.splits import split as split
from optuna_nnhp.data.tabular import TabularData as TabularData
from optuna_nnhp.data.tabular import prepare as prepare
from optuna_nnhp.data.target import Target as Target
from optuna_nnhp.data.target import infer_task as infer_task
