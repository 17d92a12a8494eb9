"""`[strategy]`: how Updates become the next model, a class each."""

from typing import Annotated, Literal

from pydantic import Field

from concord_shared.plan.section import Fraction, Positive, Section

__all__ = [
    "Ditto",
    "FedAvg",
    "FedAvgM",
    "FedBN",
    "FedNova",
    "FedOpt",
    "FedProx",
    "FedRep",
    "LeastSquares",
    "Scaffold",
    "StrategySection",
]


class FedAvg(Section):
    name: Literal["fedavg"] = "fedavg"


class FedAvgM(Section):
    name: Literal["fedavgm"]
    server_learning_rate: Positive = 1.0
    server_momentum: Fraction = 0.9


class FedProx(Section):
    name: Literal["fedprox"]
    mu: Annotated[float, Field(ge=0)] = 0.01


class FedOpt(Section):
    """Reddi et al. 2021, Algorithm 2."""

    name: Literal["fedadam", "fedyogi", "fedadagrad"]
    server_learning_rate: Positive = 0.01
    beta1: Fraction = 0.9
    beta2: Fraction = 0.99
    tau: Positive = 1e-3


class FedNova(Section):
    """Wang et al. 2020: nodes that take more steps than others do not pull the model to themselves."""

    name: Literal["fednova"]


class Scaffold(Section):
    """Karimireddy et al. 2020, option II. control_bound: the L2 bound of a change of a node's control variate."""

    name: Literal["scaffold"]
    server_learning_rate: Positive = 1.0
    control_bound: Positive = 100.0


class FedBN(Section):
    """Li et al. 2021: normalisation layers, with their running statistics, stay at their node."""

    name: Literal["fedbn"]


class Ditto(Section):
    """Li et al. 2021: each node also trains a whole model of its own, pulled to the shared one by `pull` (λ)."""

    name: Literal["ditto"]
    pull: Annotated[float, Field(ge=0)] = 0.1


class FedRep(Section):
    """Collins et al. 2021: the last `head_layers` layers stay at their node; they are trained first, for `head_epochs`
    epochs, then the body by [training].
    """

    name: Literal["fedrep"]
    head_layers: int = Field(1, ge=1, le=100)
    head_epochs: int = Field(1, ge=1, le=10_000)


class LeastSquares(Section):
    """One round: the exact solution of linear regression from summed XᵀX and Xᵀy."""

    name: Literal["least-squares"]
    moment_bound: Positive = 1e6


StrategySection = Annotated[
    FedAvg | FedAvgM | FedProx | FedOpt | FedNova | Scaffold | FedBN | Ditto | FedRep | LeastSquares,
    Field(discriminator="name"),
]
