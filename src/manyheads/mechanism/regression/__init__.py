"""Attention as regression: fit a function to keys and values, evaluate it at the query."""

from __future__ import annotations

from .estimator import KernelRegressor
from .framework import LAYERS, Layer, Regression, find_layer, regress
from .least_squares import LeastSquaresState, least_squares, ridge_regression
from .local_linear import interpolate, local_linear_attention
from .momentum import MomentumState, momentum_delta
from .nadaraya_watson import KERNELS, NadarayaWatson, kernel_weights, nadaraya_watson
from .parallax import KeysValues, parallax
from .polynomial import local_polynomial

__all__ = [
    "KERNELS",
    "KernelRegressor",
    "KeysValues",
    "LAYERS",
    "Layer",
    "LeastSquaresState",
    "MomentumState",
    "NadarayaWatson",
    "Regression",
    "find_layer",
    "interpolate",
    "kernel_weights",
    "least_squares",
    "local_linear_attention",
    "local_polynomial",
    "momentum_delta",
    "nadaraya_watson",
    "parallax",
    "regress",
    "ridge_regression",
]
