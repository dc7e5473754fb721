"""A model's parameters spread over the ranks (PyTorch's FSDP2), for losses that call any of its methods."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from dgm_models.training.blocks import blocks
from dgm_models.training.reduce import Reduction
from dgm_models.training.runtime import Runtime

_ENTRY = "run_whole"  # the method that `shard` adds to a model, and `run` calls


def shard(model: nn.Module, runtime: Runtime) -> None:
    """Leaves every rank its rows of every parameter, and moves the model to the runtime's device block by block.

    A block's parameters are gathered while its `forward` runs, and those outside the blocks while `run` runs. Gradients
    are summed over the ranks, not averaged. Parameters keep their names; buffers are whole on every rank.

    Raises: ValueError for a parameter without an axis to divide.
    """
    for name, parameter in model.named_parameters():
        if parameter.ndim == 0:
            raise ValueError(f"cluster.shard: parameter {name} is a scalar, which cannot be divided; set it to false")
    mesh = init_device_mesh(runtime.device.type, (runtime.world,))
    for block in blocks(model).values():
        if not _tied(block, model):
            block.register_forward_hook(_own_memory)
            _fully_shard(block, mesh)
    setattr(model, _ENTRY, MethodType(_call, model))
    _fully_shard(model, mesh)
    register_fsdp_forward_method(model, _ENTRY)


def _call(model: nn.Module, function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


def _tied(block: nn.Module, model: nn.Module) -> bool:
    """Whether a parameter of the block is used outside it too: it then stays with the model's own parameters."""
    inside = {id(part) for part in block.modules()}
    outside = {
        id(p) for part in model.modules() if id(part) not in inside for p in part.parameters(recurse=False)
    }  # fmt: skip
    return any(id(p) in outside for p in block.parameters())


def _own_memory(block: nn.Module, given: Any, output: Any) -> Any:
    """An output in place of a view: a write into a view would lose FSDP2's hook, and with it the gradient."""
    return output.clone() if isinstance(output, Tensor) and output._is_view() else output


def _fully_shard(module: nn.Module, mesh: DeviceMesh) -> None:
    sharded = fully_shard(module, mesh=mesh, reshard_after_forward=True)
    sharded.set_gradient_divide_factor(1.0)
    sharded.set_force_sum_reduction_for_comms(True)  # gloo has no pre-multiplied sum
    sharded.set_reduce_scatter_unused_params(True)  # ranks that reach other parameters than others must not hang


def run(model: nn.Module, function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)`; what it does with the model counts as the model's forward pass where it is sharded."""
    whole = model.__dict__.get(_ENTRY)
    return whole(function, *arguments) if whole else function(*arguments)


class ShardedReduction(Reduction):
    """The reduction of a sharded model: FSDP2 sums each block's gradients when its backward pass is done.

    A rank keeps its rows of the gradients, also between micro-batches: whole gradients of all blocks need not fit.
    A parameter that the loss does not reach gets zeros.
    """

    def backward(self, total: Tensor, last: bool) -> None:
        total.backward()  # type: ignore[no-untyped-call]

    def finish(self, scalars: Sequence[Tensor]) -> list[nn.Parameter]:
        here = [p.grad is not None for p in self.parameters]
        self._agree(here, scalars)
        return [p for p, present in zip(self.parameters, here, strict=True) if present]


def local(tensor: Tensor) -> Tensor:
    """This rank's rows of a sharded tensor, sharing its memory; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensors: Mapping[str, Tensor], keep: bool = True) -> dict[str, Tensor]:
    """Whole copies on the CPU of tensors that may be sharded; every rank calls it when one is.

    Args:
        keep: False gives {}: a rank that takes part in the gathering and needs nothing.
    """
    found = {}
    for name, tensor in tensors.items():
        full: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if keep:
            found[name] = full.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    return found


def parts(tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors divided as those of the same name in `like` are; nothing is sent, each rank takes its rows."""
    found = dict(tensors)
    for name, model in like.items():
        if isinstance(model, DTensor) and name in found and found[name].shape == model.shape:
            moved = found[name].to(model.device)
            found[name] = distribute_tensor(moved, model.device_mesh, model.placements, src_data_rank=None)
    return found
