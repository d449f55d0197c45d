"""The method: rank-stabilized low-rank adapters in plain torch."""

from rslightning.rslora.adalora import RankAllocator
from rslightning.rslora.adapters import (
    Adapter,
    adapter_parameters,
    adapter_state_dict,
    attach_adapter,
    collect_adapter,
    load_adapter_state,
)
from rslightning.rslora.inject import InjectionReport, inject_adapters
from rslightning.rslora.linear import LoRALinear, adapter_layers
from rslightning.rslora.merge import merge_adapters, unmerge_adapters, unwrap_adapters
from rslightning.rslora.peft_format import read_adapter, write_adapter
from rslightning.rslora.scaling import Scaling, scaling_factor
from rslightning.rslora.spec import AdapterSpec, RankAllocation

__all__ = [
    "Adapter",
    "AdapterSpec",
    "InjectionReport",
    "LoRALinear",
    "RankAllocation",
    "RankAllocator",
    "Scaling",
    "adapter_layers",
    "adapter_parameters",
    "adapter_state_dict",
    "attach_adapter",
    "collect_adapter",
    "inject_adapters",
    "load_adapter_state",
    "merge_adapters",
    "read_adapter",
    "scaling_factor",
    "unmerge_adapters",
    "unwrap_adapters",
    "write_adapter",
]
