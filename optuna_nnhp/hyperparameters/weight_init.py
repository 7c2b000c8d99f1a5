"""Weight initialization."""

from __future__ import annotations

from optuna.distributions import CategoricalDistribution
import torch
from torch import Generator
from torch import Tensor
from torch.nn import init

from optuna_nnhp.hyperparameters.spec import Hyperparameter

PLAIN_SCALE = 0.05  # of "normal" and "uniform", which ignore fan-in and activation

WEIGHT_INIT = Hyperparameter(
    name="weight_init",
    distribution=CategoricalDistribution(
        (
            "normal",
            "uniform",
            "xavier_normal",
            "xavier_uniform",
            "he_normal",
            "he_uniform",
            "orthogonal",
        )
    ),
    default="he_normal",
    grid_values=("xavier_uniform", "he_normal", "orthogonal"),
    task="table",
    help="Distribution of the initial weights. Xavier, He and orthogonal keep the variance of "
    "activations over the layers; plain normal and uniform (scale 0.05) do not.",
)


def initial_weight(
    scheme: str, fan_in: int, fan_out: int, gain: float, generator: Generator
) -> Tensor:
    """Draw the initial weights of one linear layer.

    Args:
        scheme:
            One of the choices of `weight_init`.
        fan_in:
            Number of inputs.
        fan_out:
            Number of outputs.
        gain:
            Factor for the activation function (`activation.ACTIVATIONS[...].gain`); "normal" and
            "uniform" do not use it.
        generator:
            The member's random number generator.

    Shape:
        - Output: ``(fan_in, fan_out)``, for ``x @ weight``.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> initial_weight("orthogonal", 8, 4, 1.0, generator).shape
        torch.Size([8, 4])

    Sources:
        Glorot and Bengio 2010 (Xavier), He et al. 2015 (arXiv:1502.01852), Saxe et al. 2013
        (arXiv:1312.6120, orthogonal); drawn by `torch.nn.init`.
    """
    weight = torch.empty(fan_out, fan_in)
    match scheme:
        case "normal":
            init.normal_(weight, std=PLAIN_SCALE, generator=generator)
        case "uniform":
            init.uniform_(weight, -PLAIN_SCALE, PLAIN_SCALE, generator=generator)
        case "xavier_normal":
            init.xavier_normal_(weight, gain, generator=generator)
        case "xavier_uniform":
            init.xavier_uniform_(weight, gain, generator=generator)
        case "he_normal":
            init.normal_(weight, std=gain / fan_in**0.5, generator=generator)
        case "he_uniform":
            bound = gain * (3 / fan_in) ** 0.5
            init.uniform_(weight, -bound, bound, generator=generator)
        case "orthogonal":
            init.orthogonal_(weight, gain, generator=generator)
        case _:
            WEIGHT_INIT.check(scheme)
    return weight.T
