"""Shards that FSDP2's CPUOffloadPolicy keeps on the CPU, beside gathered thresholds on a GPU.

No GPU is needed: tensors are fake, and fake ones refuse to be mixed as real ones do.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.testing._internal.distributed.fake_pg import FakeStore

from dst_kernels.ops.dtensor import reset_rows


def test_a_reset_reaches_a_shard_on_the_cpu():
    dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    try:
        mesh = init_device_mesh("cuda", (8,))
        whole = TensorMeta(torch.Size([16]), (1,), torch.float32)
        with FakeTensorMode():
            local = torch.ones(2)
            spec = DTensorSpec(mesh, (Shard(0),), tensor_meta=whole)
            reset_rows(
                DTensor(local, spec, requires_grad=False),
                torch.ones(16, dtype=torch.bool, device="cuda"),
            )
        assert local._version == 1, "written in place"
    finally:
        dist.destroy_process_group()
