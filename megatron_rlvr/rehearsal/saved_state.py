"""A checkpoint's state without its files: the bytes that this rank writes, and the state as if it had been read."""

from typing import Any

from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
)


def bytes_written(state: Any) -> int:
    """Return the bytes of the sharded tensors in a state that this rank writes, being the first that holds them."""
    if isinstance(state, dict):
        return sum(bytes_written(value) for value in state.values())
    if isinstance(state, list | tuple):
        return sum(bytes_written(value) for value in state)
    if isinstance(state, ShardedTensorFactory):
        return bytes_written(state.build())
    if isinstance(state, ShardedTensor) and not any(_numbers(state.replica_id)):
        assert state.data is not None
        return state.data.numel() * state.data.element_size()
    return 0


def _numbers(replica: int | tuple[int, ...]) -> tuple[int, ...]:
    return replica if isinstance(replica, tuple) else (replica,)


def loaded(state: Any) -> Any:
    """Return a state with the tensors that a load would have filled, in place of their descriptions."""
    if isinstance(state, dict):
        return {key: loaded(value) for key, value in state.items()}
    if isinstance(state, list):
        return [loaded(value) for value in state]
    if isinstance(state, ShardedTensor | ShardedObject | ShardedTensorFactory):
        return state.data
    if isinstance(state, LocalNonpersistentObject):
        return state.unwrap()
    return state
