"""The samplers of this package, which also work in studies of plain Optuna."""

from optuna_nnhp.search.bounded_tpe import BoundedTPESampler as BoundedTPESampler
from optuna_nnhp.search.evolution import EvolutionSampler as EvolutionSampler
from optuna_nnhp.search.hypergradient import HypergradientSampler as HypergradientSampler
from optuna_nnhp.search.population import PopulationSampler as PopulationSampler
from optuna_nnhp.search.zoom import ZoomSampler as ZoomSampler
