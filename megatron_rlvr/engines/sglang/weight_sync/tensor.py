"""Weight sync through the servers' HTTP ports: each bucket is the body of a request. Needs no network but HTTP.

SGLang intends this for servers on the trainer's machine and for shared memory. Here a bucket is pickled as a whole, as
text, which any server takes whose version of torch can read it. In addition to the bucket, a leader's memory holds
that text: 4/3 of the bucket's size for each of the server's tensor-parallel ranks.
"""

import base64
import json
import pickle
from types import SimpleNamespace

import torch

from megatron_rlvr.distributed.ranks import Ranks
from megatron_rlvr.engines.sglang.client import Server
from megatron_rlvr.engines.sglang.pool import ServerPool
from megatron_rlvr.engines.sglang.weight_sync.bucket_sync import BucketSync
from megatron_rlvr.engines.sglang.weight_sync.buckets import Bucket


class TensorSync(BucketSync):
    """Pushes weights in the bodies of requests; see `BucketSync`."""

    def __init__(self, pool: ServerPool | None, ranks: Ranks, bucket_bytes: int) -> None:
        super().__init__(pool, ranks, bucket_bytes, torch.device("cpu"))
        self._server_ranks: dict[str, int] = {}

    async def _open(self, server: Server) -> None:
        self._server_ranks[server.url] = await server.tensor_parallel_size()

    def _pack(self, bucket: Bucket) -> dict[int, bytes]:
        """Return {number of a server's ranks: body of the request}; every rank reads its own copy of the bucket."""
        text = base64.b64encode(pickle.dumps(_contents(bucket))).decode("ascii")
        options = {"load_format": "flattened_bucket", "flush_cache": False}
        return {
            ranks: json.dumps(options | {"serialized_named_tensors": [text] * ranks}).encode("ascii")
            for ranks in set(self._server_ranks.values())
        }

    async def _send(self, server: Server, packed: dict[int, bytes], timeout_seconds: float) -> None:
        body = packed[self._server_ranks[server.url]]
        await server.take_bucket("/update_weights_from_tensor", body, timeout_seconds)


def _contents(bucket: Bucket) -> dict[str, object]:
    """Return the object that a server unpickles: it reads these names, and accepts no classes but standard ones."""
    entries, start = [], 0
    for name, dtype, shape in zip(bucket.names, bucket.dtypes, bucket.shapes, strict=True):
        size = shape.numel() * dtype.itemsize
        entries.append(
            SimpleNamespace(name=name, dtype=dtype, shape=shape, start_idx=start, end_idx=start + size, numel=size)
        )
        start += size
    # Pickling a tensor writes its whole storage, so a bucket that is a part of a larger storage is cloned.
    data = bucket.data if bucket.data.untyped_storage().nbytes() == bucket.bytes else bucket.data.clone()
    return {"flattened_tensor": data, "metadata": entries}
