"""The command `rlvr analyze`: what training did to entropies and weights."""
