"""Study templates: data, space, network and metric, said once each."""

from optuna_nnhp.templates.dnn import DNN as DNN
from optuna_nnhp.templates.predictor import TabularPredictor as TabularPredictor

TEMPLATES = {"dnn": DNN}
