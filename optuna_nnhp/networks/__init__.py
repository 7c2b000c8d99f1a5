"""Stacked networks of k members, and the same networks as plain torch modules."""

from optuna_nnhp.networks.mlp import StackedMLP as StackedMLP
from optuna_nnhp.networks.mlp import build_mlp as build_mlp
from optuna_nnhp.networks.mlp import count_weights as count_weights
from optuna_nnhp.networks.mlp import mlp_signature as mlp_signature
