"""Accelerate's FSDP2 on the CPU, where its plugin silently gives DDP: told that it may, it shards there as on GPUs."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def shard(*layers: str) -> None:
    """From now on each module of these classes is sharded over the two processes by itself, and the rest as one."""
    begin, prepare = Accelerator.__init__, Accelerator.prepare

    def beginning(self: Accelerator, *args: Any, **words: Any) -> None:
        begin(self, *args, **words)
        self.state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        self.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=list(layers)
        )

    def preparing(self: Accelerator, *args: Any) -> Any:
        module, optimizer = prepare(self, *args)
        split = {type(part).__name__ for part in module.modules() if isinstance(part, FSDPModule)}
        assert isinstance(module, FSDPModule) and split >= {f"FSDP{name}" for name in layers}, split
        assert self.num_processes == 2 and all(isinstance(one, DTensor) for one in module.parameters())
        return module, optimizer

    Accelerator.__init__, Accelerator.prepare = beginning, preparing  # type: ignore[method-assign]
