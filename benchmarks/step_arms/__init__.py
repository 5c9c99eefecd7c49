"""The two trainers that benchmarks/step.py runs in turn, and their common workload.

An arm is a module with ``run(case, folder, steps, pipe)``. It loads the model of a folder, sends the megabytes that its
process then occupies, and for each training step waits for a message and answers with a dict of metrics. The modules of
the arms import torch; this one and `workload` do not, so that the main process stays small.
"""
