"""Generated first-person-like footage whose truth is known, for the demo, the tests and the benchmarks."""

from ego2robot.sample.footage import Footage, make_footage
from ego2robot.sample.truth import GateScore, hands_at, load_truth, load_truths, score_gate, truth_of_clip

__all__ = [
    "Footage",
    "GateScore",
    "hands_at",
    "load_truth",
    "load_truths",
    "make_footage",
    "score_gate",
    "truth_of_clip",
]
