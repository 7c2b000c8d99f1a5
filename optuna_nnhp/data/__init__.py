"""Turn tables, arrays and texts into tensors: read, check, split, preprocess."""

from __future__ import annotations

from optuna_nnhp.data.columns import MAX_CATEGORIES as MAX_CATEGORIES
from optuna_nnhp.data.frames import as_frame as as_frame
from optuna_nnhp.data.frames import as_target as as_target
from optuna_nnhp.data.frames import check_consistent_length as check_consistent_length
from optuna_nnhp.data.frames import read_csv as read_csv
from optuna_nnhp.data.preprocessor import Preprocessor as Preprocessor
from optuna_nnhp.data.splits import train_validation_split as train_validation_split
from optuna_nnhp.data.supervised import SupervisedData as SupervisedData
from optuna_nnhp.data.supervised import prepare_table as prepare_table
from optuna_nnhp.data.target import Target as Target
from optuna_nnhp.data.target import infer_task as infer_task
