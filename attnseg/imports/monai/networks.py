"""Networks of MONAI that a bundle may name, built with plain arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sized
from dataclasses import dataclass
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from attnseg.imports.monai.config import Component
from attnseg.imports.networks import load_weights
from attnseg.runtime.errors import ExportError
from attnseg.runtime.geometry import Shape, along_axes, shape_of

_WITHOUT_EFFECT = {"SwinUNETR": ("img_size",)}
"""Arguments that MONAI 1.4 took and checked only, and that later versions do not take."""


_LARGEST_NUMBER = 4096  # of channels, voxels or features
_MOST_ITEMS = 64  # of a list of channels or blocks
_COUNTS = ("blocks_down", "blocks_up", "depths", "num_res_units")  # of layers


@dataclass(frozen=True)
class BuiltNetwork:
    """A network that a config names, before its weights are read.

    Attributes:
        network: The network on PyTorch's `meta` device, where tensors have sizes and no memory.
        make: Function that builds the network in memory.
        channels: Number of input channels.
        outputs: Number of output channels.
        window_multiple: Number of voxels that its input sizes must be a multiple of.
    """

    network: nn.Module
    make: Callable[[], nn.Module]
    channels: int
    outputs: int
    window_multiple: Shape

    def with_weights(self, file: Path, weights: Mapping[str, Any]) -> nn.Module:
        """The network in evaluation mode with the weights of a file.

        It is built in memory, as some networks compute tensors that are not among the weights, and
        only if the file can hold its weights.

        Raises:
            ExportError: The weights are not those of the network.
        """
        tensors = chain(self.network.parameters(), self.network.buffers())
        count, size = sum(tensor.numel() for tensor in tensors), file.stat().st_size
        if count > size:
            raise ExportError(
                f"{file}: its weights are not those of the network that the model names "
                f"({count} weights, and the file has {size} bytes)",
                "give the model as it was trained",
            )
        return load_weights(file, self.make(), weights).eval()


class _LinspaceOnCpu(TorchFunctionMode):
    """Keeps `torch.linspace` off `meta`: SwinUNETR takes dropout rates from its values."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        return func(*args, **(kwargs | {"device": "cpu"} if func is torch.linspace else kwargs))


def _of_strides(strides: Any) -> Shape:
    """Product of strides, each one number or one for each axis."""
    along = zip(*(along_axes(stride) for stride in strides), strict=True)
    return shape_of([prod(own) for own in along])


_MULTIPLES: dict[str, Callable[[Any, dict[str, Any]], Shape]] = {
    "BasicUNet": lambda network, given: (16, 16, 16),
    "DynUNet": lambda network, given: _of_strides(given["strides"]),
    "SegResNet": lambda network, given: along_axes(2 ** (len(given["blocks_down"]) - 1)),
    "SegResNetDS": lambda network, given: shape_of(network.shape_factor()),
    "SwinUNETR": lambda network, given: along_axes(given["patch_size"] ** 5),
    "UNETR": lambda network, given: along_axes(given["img_size"]),
    "UNet": lambda network, given: _of_strides(given["strides"][: len(given["channels"]) - 1]),
    "VNet": lambda network, given: (16, 16, 16),
}
"""Networks, and the multiple of each, computed from its arguments."""


def build_monai(component: Component) -> BuiltNetwork:
    """Build the network that a config names.

    Raises:
        ExportError: The network is not listed here, is not 3-D, or MONAI cannot build it from these
            arguments.
    """
    from monai.networks import nets

    name, module = component.name, component.module
    if name not in _MULTIPLES or (module and not module.startswith("monai.networks.nets")):
        named = f"{module}.{name}" if module else name
        component.refuse(
            f"is the network {named}", f"import bundles with {', '.join(sorted(_MULTIPLES))}"
        )
    component.ignore(*_WITHOUT_EFFECT.get(name, ()))
    arguments = component.arguments()
    for argument, value in arguments.items():
        _check_size(component, argument, value)
    kind = getattr(nets, name)
    try:
        bound = inspect.signature(kind).bind(**arguments)
        bound.apply_defaults()
        with torch.device("meta"), _LinspaceOnCpu():
            network = kind(**arguments)
        given = bound.arguments
        multiple = _MULTIPLES[name](network, given)
        channels, outputs = int(given["in_channels"]), int(given["out_channels"])
    except Exception as error:  # networks raise what their arguments lead to
        reason = " ".join(str(error).split())[:200]
        component.refuse(f"cannot be built ({type(error).__name__}: {reason})")
    if given["spatial_dims"] != 3:
        component.refuse(f"has spatial_dims {given['spatial_dims']}, not 3")
    return BuiltNetwork(network, lambda: kind(**arguments), channels, outputs, multiple)


def _check_size(component: Component, argument: str, value: Any) -> None:
    """Refuse numbers that make a network larger than any is."""
    most = _MOST_ITEMS if argument in _COUNTS else _LARGEST_NUMBER
    items = value.values() if isinstance(value, dict) else value
    if isinstance(items, int | float) and not abs(items) <= most:
        component.refuse(f"has {argument} {items}, more than {most}")
    if isinstance(items, Sized) and len(items) > _MOST_ITEMS:
        component.refuse(f"has {argument} of more than {_MOST_ITEMS} items")
    if isinstance(items, Iterable) and not isinstance(items, str):
        for item in items:
            _check_size(component, argument, item)
