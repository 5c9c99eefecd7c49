"""Reinforcement learning with verifiable rewards on megatron-core, with the policy gradient on forking tokens only."""

__version__ = "0.1.0"
