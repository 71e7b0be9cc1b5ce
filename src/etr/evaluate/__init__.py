"""Evaluation: held-out loss by domain, kept shares, score histograms, calibration."""

from etr.evaluate.calibrate import calibrate
from etr.evaluate.held_out import EvalResult, evaluate
from etr.evaluate.scores import score_densities

__all__ = ["EvalResult", "calibrate", "evaluate", "score_densities"]
