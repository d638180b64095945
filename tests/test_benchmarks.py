"""Numbers of the GPU benchmark against values computed by hand, and a run on a host device."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from attnseg import Bundle, Volume
from attnseg.synthetic import SyntheticCase
from benchmarks import gpu
from benchmarks.gpu import CARDS, Card, Layer, layers_of, percentile, roofline_ms, work_of
from tests.conftest import LinearEngine
from tests.runtime.cuda.engines import Through
from tests.runtime.cuda.host_device import HostDevice
from tests.runtime.cuda.host_kernels import HostKernels


def test_a_networks_work_is_that_of_its_convolutions(tmp_path: Path) -> None:
    def weights(name: str, *shape: int) -> TensorProto:
        return numpy_helper.from_array(np.zeros(shape, np.float32), name)

    dims = ["batch", 2, "x", "y", "z"]
    nodes = [
        helper.make_node("Conv", ["image", "a"], ["b"], pads=[1] * 6, strides=[2] * 3),
        helper.make_node("Relu", ["b"], ["c"]),
        helper.make_node("ConvTranspose", ["c", "d"], ["logits"], strides=[2] * 3),
    ]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [*dims[:1], size, *dims[2:]])
        for name, size in (("image", 2), ("logits", 5))
    ]
    stored = [weights("a", 3, 2, 3, 3, 3), weights("d", 3, 5, 2, 2, 2)]
    graph = helper.make_graph(nodes, "two layers", ends[:1], ends[1:], stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.save(model, tmp_path / "m.onnx")
    first, second = layers_of(tmp_path / "m.onnx", (4, 6, 8))
    # 2x3x4 voxels of 3 channels from 2 channels and 27 weights each; two per multiply-add.
    assert first.flops == 2 * 24 * 3 * 2 * 27
    assert first.moved_bytes == 2 * (2 * 192 + 3 * 24 + 162)
    # Each of 24 voxels and 3 channels is multiplied by 5 x 8 weights.
    assert second.flops == 2 * 24 * 3 * 5 * 8
    assert second.moved_bytes == 2 * (3 * 24 + 5 * 192 + 120)


def test_the_roofline_is_the_slower_of_both_rates() -> None:
    card = Card(bytes_per_s=1e9, flops=1e12, link_bytes_per_s=1)
    # 3 ms of multiplications, then 2 ms of bytes; ten windows.
    layers = [Layer(3 * 10**9, 10**6), Layer(10**9, 2 * 10**6)]
    assert roofline_ms(layers, 10, card) == pytest.approx(50)


def test_the_shipped_networks_work_is_the_one_that_is_documented() -> None:
    layers = layers_of(Bundle.default().file("onnx"), (64, 64, 64))
    assert sum(layer.flops for layer in layers) / 2e9 == pytest.approx(12.7, abs=0.15)
    assert set(CARDS) >= {"RTX 3090", "H200"}


def test_percentiles_are_of_the_nearest_rank() -> None:
    times = [float(n) for n in range(1, 21)]
    assert (percentile(times, 50), percentile(times, 95), percentile([7.0], 95)) == (10, 19, 7)


def test_the_work_that_is_counted_is_the_work_that_is_done(
    small_synthetic: SyntheticCase,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    volume = Volume(small_synthetic.images, small_synthetic.affine)
    device = HostDevice(HostKernels(tmp_path).launch)
    engine = Through(device, LinearEngine(np.ones((4, 4), np.float32)), half=True)
    work, stages = gpu.measure_kernels(Bundle.default(), engine, volume, 1)
    counted = work_of(Bundle.default(), volume)
    assert counted.launches == work.launches
    assert counted.moved_bytes == work.moved_bytes
    assert counted.windows == work.windows > 0
    voxels = int(np.prod(volume.shape))
    assert work.moved_bytes["scan"] == 4 * 2 * voxels
    assert all(work.elapsed_ms[name] > 0 for name in work.launches)
    assert stages["network"] > 0
    gpu.print_kernels(work, CARDS["RTX 3090"], timed=True)
    gpu.print_projection(work, [Layer(10**9, 10**6)], voxels, gpu.AIMED)
    printed = capsys.readouterr().out
    assert "blend" in printed and "a projection, not measured" in printed
