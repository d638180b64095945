"""Export of a network to ONNX: folded batch norms, dynamic sizes, reproducible byte for byte."""

from __future__ import annotations

import copy
import logging
import warnings
from itertools import pairwise

import onnx
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from attnseg.export.graphs.graph import Graph
from attnseg.trainer.baselines import ConvBlock
from attnseg.trainer.model import MultiScale, ResidualBlock
from attnseg.trainer.networks import Network

OPSET = 20
INPUT, OUTPUT = "image", "logits"


def _slice_norm(norm: nn.BatchNorm3d, start: int, stop: int) -> nn.BatchNorm3d:
    """The part of a batch norm that acts on channels `start` to `stop`."""
    part = nn.BatchNorm3d(stop - start, norm.eps).eval()
    for name, value in norm.state_dict().items():
        if value.ndim:
            getattr(part, name).data.copy_(value[start:stop])
    return part


def fold_batch_norms(network: Network) -> Network:
    """A copy for inference in which batch norms are folded into the convolutions before them.

    Batch norms that follow no convolution, as before the units of a residual U-Net, remain.
    """
    folded = copy.deepcopy(network).eval()
    for module in folded.modules():
        if isinstance(module, ResidualBlock):
            module.conv1 = fuse_conv_bn_eval(module.conv1, module.norm)
            module.norm = nn.Identity()  # type: ignore[assignment]
        elif isinstance(module, ConvBlock):
            module.conv = fuse_conv_bn_eval(module.conv, module.norm)
            module.norm = nn.Identity()  # type: ignore[assignment]
        elif isinstance(module, MultiScale):
            half = module.branches[0].out_channels
            for index, branch in enumerate(module.branches):
                assert isinstance(branch, nn.Conv3d) and isinstance(half, int)
                part = _slice_norm(module.norm, index * half, (index + 1) * half)
                module.branches[index] = fuse_conv_bn_eval(branch, part)
            module.norm = nn.Identity()  # type: ignore[assignment]
        elif isinstance(module, nn.Sequential):
            _fold_pairs(module)
    return folded


def _fold_pairs(layers: nn.Sequential) -> None:
    """Fold each batch norm that directly follows a convolution, or begins a nested sequence."""
    for index, (conv, after) in enumerate(pairwise(layers)):
        sequence, place = (after, 0) if isinstance(after, nn.Sequential) else (layers, index + 1)
        norm = sequence[place] if place < len(sequence) else None
        if isinstance(conv, nn.Conv3d) and isinstance(norm, nn.BatchNorm3d):
            layers[index] = fuse_conv_bn_eval(conv, norm)
            sequence[place] = nn.Identity()


def tidy(model: onnx.ModelProto) -> None:
    """Remove the exporter's metadata about the machine and the source code; name the dimensions.

    Dimensions of a fixed size keep it.
    """
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    values = (*model.graph.input, *model.graph.output, *model.graph.value_info)
    for value in values:
        del value.metadata_props[:]
    for initializer in model.graph.initializer:
        del initializer.metadata_props[:]
    del model.graph.metadata_props[:]
    del model.metadata_props[:]
    del model.graph.value_info[:]
    for value in (*model.graph.input, *model.graph.output):
        dims = value.type.tensor_type.shape.dim
        for dim, name in zip((dims[0], *dims[2:]), ("batch", "x", "y", "z"), strict=True):
            if not dim.HasField("dim_value"):
                dim.dim_param = name
    model.graph.name = "attnseg"


def export_onnx(network: Network) -> Graph:
    """Serialise the network as ONNX.

    Args:
        network: Network in evaluation mode, on the CPU.

    Returns:
        Graph with input `image` `(batch, C, x, y, z)` and output `logits` `(batch, K, x, y, z)`,
        float32; x, y and z must be multiples of the network's stride. It has been validated by
        onnx.checker with full shape inference.
    """
    multiple = network.config.stride
    edge = {
        axis: multiple * torch.export.Dim(name) for axis, name in ((2, "x"), (3, "y"), (4, "z"))
    }
    # Sizes differ from each other and from 1, or the tracer specialises them as constants.
    example = torch.zeros(2, network.config.in_channels, *(multiple * n for n in (2, 3, 4)))
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # its package hints are not needed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's warnings about its own internals
        program = torch.onnx.export(
            fold_batch_norms(network),
            (example,),
            dynamo=True,
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes={INPUT: {0: torch.export.Dim("batch"), **edge}},
            verbose=False,
        )
    assert program is not None
    model = program.model_proto
    tidy(model)
    onnx.checker.check_model(model, full_check=True)
    return Graph(model)
