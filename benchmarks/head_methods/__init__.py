"""Methods that benchmarks/head.py compares, by name; all compute the same log-probabilities, entropies and gradients.

Every method takes the same `Inputs` and returns an `Outcome`; its loss is minus the sum of the log-probabilities of the
selected rows (of all rows, for a dense one), so all gradients can be compared with one reference.
"""

from head_methods import ours, peers
from head_methods.workload import Inputs, Method, Outcome, largest_errors, make_inputs

__all__ = ["METHODS", "Inputs", "Method", "Outcome", "largest_errors", "make_inputs"]

METHODS: dict[str, Method] = ours.METHODS | peers.METHODS
