"""What a model costs: parameters, multiply-accumulates and bytes counted, latency measured."""

from secateur.measuring.counts import Counts, count
from secateur.measuring.latency import Latency, Measurement, measure
from secateur.measuring.runtimes import RUNTIMES

__all__ = ["RUNTIMES", "Counts", "Latency", "Measurement", "count", "measure"]
