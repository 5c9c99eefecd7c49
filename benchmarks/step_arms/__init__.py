"""The two trainers that benchmarks/step.py lets take turns, and what both are given.

An arm is a module with ``run(case, folder, steps, pipe)``. It sets itself up from a model folder, sends the megabytes
that it occupies then, and for each training step waits for a message and answers with a dict of metrics (`workload`).
The modules of the arms import torch and more; this one and `workload` do not, so that the program stays small.
"""
