"""Samplers and pruners: which values to try, and which trials to end."""

from optuna_nnhp.search.follower import FollowerSampler as FollowerSampler
from optuna_nnhp.search.halving import CohortHalvingPruner as CohortHalvingPruner
from optuna_nnhp.search.methods import METHODS as METHODS
from optuna_nnhp.search.methods import make_sampler as make_sampler
