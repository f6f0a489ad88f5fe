"""Nets and data that cannot make a model are refused, in words that say what to do."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

import bnn
from bnn.guides import AutoMatrixNormal
from bnn.likelihoods import Gaussian, Poisson
from bnn.priors import Fixed
from support.plain_nets import CLASSES, MLP, Residual, Transformer, Two, mlp


class Constant(nn.Module):
    """Its output is what it was given, whatever x."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.weight, self.output = nn.Parameter(torch.zeros(())), output

    def forward(self, x: Tensor) -> Any:
        return self.output


class Uncopied(nn.Linear):
    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("holds a lock")


class Named(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.register_parameter(name, nn.Parameter(torch.zeros(1)))


def built(net: Any, **settings: Any) -> Callable[[], Any]:
    return lambda: bnn.bayesian(net, **{"likelihood": Gaussian(), **settings})


def called(net: nn.Module, *args: Any, **settings: Any) -> Callable[[], Any]:
    return lambda: bnn.bayesian(net, **{"likelihood": Gaussian(), **settings})(*args)


def scripted() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = torch.jit.script(nn.Linear(2, 1))
    bnn.bayesian(net, likelihood=Gaussian())


X, Y = torch.zeros(5, 2), torch.zeros(5)
MISTAKES: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "no module": (built(torch.tanh), ("net is builtin", "torch.nn.Module")),
    "no parameters": (built(nn.Tanh()), ("the net (Tanh) has no parameters",)),
    "lazy": (built(nn.LazyLinear(1)), ("'weight' of the net has no shape yet", "once on a batch")),
    "PyroModule": (built(nn.Sequential(PyroModule[nn.Linear](2, 1))), ("'0' (PyroLinear) is a PyroModule", "by hand")),
    "scripted": (scripted, ("the net is compiled", "plain nn.Module")),
    "compiled": (built(torch.compile(nn.Linear(2, 1))), ("the net is compiled", "plain nn.Module")),
    "no copy": (built(Uncopied(2, 1)), ("(Uncopied) cannot be copied", "holds a lock")),
    "batch norm": (built(Residual(nn.BatchNorm2d(2))), ("'norm' (BatchNorm2d)", "net.eval()", "nn.GroupNorm")),
    "batch norm without averages": (
        built(nn.BatchNorm1d(2, track_running_stats=False).eval()),
        ("the net (BatchNorm1d)", "statistics of its batch"),
    ),
    "instance norm": (
        built(nn.InstanceNorm1d(2, affine=True, track_running_stats=True)),
        ("the net (InstanceNorm1d)", "running statistics", "eval()"),
    ),
    "dropout": (built(nn.Sequential(nn.Linear(2, 1), nn.Dropout(0.2))), ("'1' (Dropout)", "p = 0.2", "net.eval()")),
    "attention's dropout": (built(Transformer()), ("'layer.self_attn' (MultiheadAttention)", "p = 0.1")),
    "dropout between cells": (built(nn.LSTM(2, 3, 2, dropout=0.3)), ("the net (LSTM)", "p = 0.3")),
    "random slopes": (built(nn.Sequential(nn.Linear(2, 1), nn.RReLU())), ("'1' (RReLU)", "slopes at random", "eval()")),
    "no likelihood": (built(mlp(), likelihood=Gaussian), ("likelihood is <class", "bnn.likelihoods.Gaussian(0.1)")),
    "name of the data": (built(Named("y")), ("'y' of the net has the name of another site", "rename")),
    "name of the noise": (
        built(Named("scale"), likelihood=Gaussian(dist.HalfCauchy(1.0))),
        ("'scale' of the net", "'data', 'scale', 'y'"),
    ),
    "nothing random": (built(mlp(), prior=Fixed()), ("keeps every parameter", "learns nothing", "'*.weight'")),
    "batch size": (built(mlp(), batch_size=0), ("batch_size is 0", "at least 1")),
    "number of data": (built(mlp(), num_data=10.0), ("num_data is 10.0", "whole number")),
    "both": (built(mlp(), batch_size=5, num_data=10), ("batch_size=5", "num_data=10", "one of the two")),
    "x in double": (called(mlp(), X.double(), Y), ("x is torch.float64", "parameters torch.float32", "x.to(")),
    "x is a list": (called(mlp(), [[1.0, 2.0]], Y), ("x is list of list", "give a tensor")),
    "x is an array": (called(mlp(), np.zeros((5, 2)), Y), ("x is ndarray", "give a tensor")),
    "x of two lengths": (called(Two(), (X, torch.zeros(4, 4)), Y), ("(5, 2), (4, 4)", "the same for all")),
    "x without rows": (called(mlp(), torch.zeros(0, 2)), ("(0, 2)", "at least one")),
    "x not a number": (called(mlp(), torch.full((5, 2), math.nan), Y), ("x holds 10 values", "NaN")),
    "y of another length": (called(mlp(), X, torch.zeros(4)), ("x has 5 rows, y has shape (4,)", "the same rows")),
    "mask of another length": (called(mlp(), X, Y, Y[:3] > 0), ("x has 5 rows, mask has shape (3,)",)),
    "more rows than data": (called(mlp(), X, Y, num_data=4), ("5 rows", "num_data=4")),
    "two outputs": (called(nn.Linear(2, 2), X, Y), ("y has shape (5,)", "(5, 2)", "targets (N, 2)")),
    "outputs and state": (called(nn.LSTM(2, 3), X, Y), ("returns tuple", "[0][:, -1]")),
    "outputs in other rows": (called(Constant(torch.zeros(2, 5)), X, Y), ("(2, 5) for 5 rows", "batch_first=True")),
    "one output": (called(Constant(torch.zeros(())), X, Y), ("() for 5 rows",)),
    "classes as outputs": (called(Constant(torch.zeros(5).long()), X, Y), ("torch.int64", "logits")),
    "law of a stranger": (lambda: MLP.model().law("3.weight"), ("no parameter '3.weight'", "'0.weight', '0.bias'")),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_refused_in_words(name: str) -> None:
    act, words = MISTAKES[name]
    with pytest.raises(ValueError) as caught:
        act()
    for word in words:
        assert word in str(caught.value), str(caught.value)


def by_guide(model: Any, x: Tensor, y: Tensor) -> None:
    AutoMatrixNormal(model)(x, y)


@pytest.mark.parametrize("run", [bnn.Potential, by_guide], ids=["kernels", "guides"])
def test_words_reach_the_user_as_they_are(run: Callable[..., Any]) -> None:
    """And not as some failure of the model."""
    model = MLP.model(nn.Linear(2, CLASSES))
    with pytest.raises(ValueError, match=r"^y has shape \(5,\), but Gaussian on a net that returns"):
        run(model, X, Y)
    counts = bnn.bayesian(mlp(), likelihood=Poisson())
    with pytest.raises(ValueError, match=r"^y holds -1 in row 0; Poisson wants whole numbers of at least 0"):
        run(counts, X, Y - 1)
