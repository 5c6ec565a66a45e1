"""Layers around attention, and layers in its place."""

from __future__ import annotations

from .attention import Attention
from .dsa import DSA, DSAConfig
from .gated_delta import GatedDeltaNet
from .least_squares import LeastSquares
from .local_linear import LocalLinearAttention
from .mlstm import MLSTM
from .msa import MSA
from .natsl import NATSL
from .neighborhood import NeighborhoodAttention1D, NeighborhoodAttention2D, NeighborhoodAttention3D
from .nsa import NSA
from .parallax import Parallax
from .rat import RAT
from .shortconv import ShortConv

__all__ = [
    "Attention",
    "DSA",
    "DSAConfig",
    "GatedDeltaNet",
    "LeastSquares",
    "LocalLinearAttention",
    "MLSTM",
    "MSA",
    "NATSL",
    "NSA",
    "NeighborhoodAttention1D",
    "NeighborhoodAttention2D",
    "NeighborhoodAttention3D",
    "Parallax",
    "RAT",
    "ShortConv",
]
