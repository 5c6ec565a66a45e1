"""Tells the catalogue which tests hold the checks of sequence packing."""

from __future__ import annotations

from manyheads.method.packing import EVIDENCE
from manyheads.spec import evidence

evidence("packing", EVIDENCE, object="manyheads.method.packing")
