"""Networks on several devices, stood in for by tensors that know a place and refuse to meet others elsewhere."""

from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ptqd.diffusion.several_devices import align_devices

PLACES = tuple(torch.device("cuda", index) for index in range(3))


class Placed(torch.Tensor):
    """A tensor that is said to be on a device that is not there."""

    place: torch.device
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]


class Devices(TorchFunctionMode):
    """Inside the block tensors are where they were placed, and what meets others elsewhere fails."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func == torch.Tensor.device.__get__ and isinstance(args[0], Placed):
            return args[0].place
        if func == torch.Tensor.to and isinstance(args[-1], torch.device):
            return placed(args[0].clone(), args[1])
        met = {x.place for x in tree_leaves((args, kwargs)) if isinstance(x, Placed) and x.ndim}
        if len(met) > 1:
            raise RuntimeError(f"expected all tensors to be on the same device, but found {met}")
        asked = kwargs.pop("device", None) if kwargs.get("device") in PLACES else None
        result = func(*args, **kwargs)
        place = asked or next(iter(met), PLACES[0])
        return tree_map_only(torch.Tensor, lambda x: placed(x, place), result)


def placed(x: torch.Tensor, place: torch.device) -> Placed:
    result = x.as_subclass(Placed)
    result.place = place
    return result


def put(module: nn.Module, place: torch.device) -> None:
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            part._parameters[name] = placed(parameter.detach().as_subclass(torch.Tensor), place)  # type: ignore[assignment]


def network() -> Any:
    torch.manual_seed(0)
    kinds = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}
    kinds["up_block_types"] = ("UpBlock2D", "CrossAttnUpBlock2D")
    sizes: dict[str, Any] = {"block_out_channels": (16, 32), "cross_attention_dim": 16, "attention_head_dim": 4}
    return UNet2DConditionModel(norm_num_groups=8, layers_per_block=1, **kinds, **sizes).eval()


@torch.no_grad()
def test_parts_on_several_devices_are_given_what_they_take() -> None:
    model, x, text = network(), torch.randn(2, 4, 8, 8), torch.randn(2, 5, 16)
    want = model(x, 5, text)[0]
    put(model, PLACES[0])
    put(model.mid_block, PLACES[1])
    put(model.up_blocks, PLACES[1])
    put(model.conv_out, PLACES[2])
    x, text = placed(x, PLACES[0]), placed(text, PLACES[0])
    with Devices():
        with pytest.raises(RuntimeError, match="same device"):
            model(x, 5, text)
        align_devices(model)
        align_devices(model)  # once is enough
        assert max(len(module._forward_pre_hooks) for module in model.modules()) == 1
        found = model(x, 5, text)[0]
        assert found.device == PLACES[0]
    assert torch.equal(found.as_subclass(torch.Tensor), want)


def test_a_network_on_one_device_is_left_alone() -> None:
    model = network()
    align_devices(model)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@torch.no_grad()
def test_where_a_part_is_is_looked_up_as_it_is_called() -> None:
    model, x, text = network(), placed(torch.randn(1, 4, 8, 8), PLACES[0]), placed(torch.randn(1, 5, 16), PLACES[0])
    put(model, PLACES[0])
    put(model.mid_block, PLACES[1])
    with Devices():
        align_devices(model)
        put(model.mid_block, PLACES[2])
        assert model(x, 5, text)[0].device == PLACES[0]
