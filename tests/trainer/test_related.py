from __future__ import annotations

import sys

import pytest
import torch
from monai.networks.nets import BasicUNetPlusPlus
from torch import Tensor, nn

from attnseg.data.task import BRATS
from attnseg.export.source.checkpoint import _describe
from attnseg.export.source.onnx import export_onnx
from attnseg.runtime.engines.libraries import import_onnxruntime
from attnseg.runtime.errors import DependencyError
from attnseg.trainer.model import MODELS, RELATED, Architecture, NetworkConfig
from attnseg.trainer.networks import build_network, count_parameters
from attnseg.trainer.related import (
    AtrousPyramid,
    DeepLabV3,
    PreActivationUnit,
    ResidualUNet,
    UNetPlusPlus,
)
from attnseg.trainer.summary import network_costs, summary_rows
from tests.export.conftest import lively_network


def tiny(architecture: Architecture) -> NetworkConfig:
    """A network for 3 modalities and 5 classes."""
    widths = (4, 6, 8, 10) if architecture == "unetplusplus" else (2, 4)
    bottleneck = 12 if architecture == "unetplusplus" else 6
    return NetworkConfig(3, 5, widths, bottleneck, "none", False, architecture)


def conv(channels_in: int, channels_out: int, kernel: int = 3) -> int:
    """Parameters of a convolution: its kernel and a bias per channel."""
    return kernel**3 * channels_in * channels_out + channels_out


def norm(channels: int) -> int:
    return 2 * channels


def test_the_parameters_of_residual_unet_by_hand() -> None:
    def unit(c_in: int, c_out: int, first: bool = False) -> int:
        layers = conv(c_in, c_out) + norm(c_out) + conv(c_out, c_out) + conv(c_in, c_out, 1)
        return layers + (0 if first else norm(c_in))

    encoder = unit(3, 2, first=True) + unit(2, 4) + unit(4, 6)
    decoder = unit(6 + 4, 4) + unit(4 + 2, 2)
    expected = encoder + decoder + conv(2, 5, 1)
    assert count_parameters(ResidualUNet(tiny("residualunet"))) == expected


def test_the_parameters_of_deeplab_by_hand() -> None:
    def block(c_in: int, c_out: int) -> int:
        project = conv(c_in, c_out, 1) if c_in != c_out else 0
        return conv(c_in, c_out) + norm(c_out) + conv(c_out, c_out) + project

    encoder = block(3, 2) + block(2, 2) + block(2, 4) + block(4, 4)
    # One 1x1x1 branch, three dilated ones, the mean without a norm, and the fusion of all five.
    branches = conv(4, 6, 1) + norm(6) + 3 * (conv(4, 6) + norm(6)) + conv(4, 6, 1)
    fusion = conv(5 * 6, 6, 1) + norm(6)
    expected = encoder + branches + fusion + conv(6, 5, 1)
    assert count_parameters(DeepLabV3(tiny("deeplabv3"))) == expected


def test_the_parameters_of_unet_plus_plus_by_hand() -> None:
    def two(c_in: int, c_out: int) -> int:
        return conv(c_in, c_out) + norm(c_out) + conv(c_out, c_out) + norm(c_out)

    def node(below: int, beside: int, out: int, keeps: bool = False) -> int:
        """A node of the nested decoder; transposed convolutions halve, but not to the top row."""
        up = below if keeps else below // 2
        return conv(below, up, 2) + two(up + beside, out)

    a, b, c, d, e = 4, 6, 8, 10, 12
    encoder = two(3, a) + two(a, b) + two(b, c) + two(c, d) + two(d, e)
    top = sum(node(b, n * a, a, keeps=True) for n in (1, 2, 3, 4))
    second = sum(node(c, n * b, b) for n in (1, 2, 3))
    third = sum(node(d, n * c, c) for n in (1, 2))
    expected = encoder + top + second + third + node(e, d, d) + conv(a, 5, 1)
    assert count_parameters(UNetPlusPlus(tiny("unetplusplus"))) == expected


@pytest.mark.parametrize("name", RELATED)
def test_logits_have_the_size_of_the_image(name: Architecture) -> None:
    network = build_network(tiny(name)).eval()
    stride = {"residualunet": 4, "deeplabv3": 4, "unetplusplus": 16}[name]
    assert network.config.stride == stride
    sizes = (2 * stride, 3 * stride, stride)
    assert network(torch.zeros(2, 3, *sizes)).shape == (2, 5, *sizes)


def zero(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.data.zero_()


def test_a_unit_adds_its_input_projected_at_its_stride() -> None:
    unit = PreActivationUnit(1, 1, stride=2).eval()
    zero(unit.residual)
    unit.project.weight.data.fill_(3)
    unit.project.bias.data.fill_(1)
    image = torch.arange(64.0).view(1, 1, 4, 4, 4)
    assert torch.equal(unit(image), 3 * image[:, :, ::2, ::2, ::2] + 1)


def test_only_the_first_unit_takes_its_input_without_norm_and_relu() -> None:
    for first in (True, False):
        unit = PreActivationUnit(1, 1, first=first).eval()
        zero(unit)
        unit.residual[1].weight.data[..., 1, 1, 1] = 1
        unit.residual[2].weight.data.fill_(1)
        unit.residual[4].weight.data[..., 1, 1, 1] = 1
        if not first:
            unit.residual[0][0].weight.data.fill_(1)
            unit.residual[0][0].bias.data.fill_(-2)
        # Batch norms divide by sqrt(1 + 1e-5). With its bias of -2 the first one leaves 1 of 3.
        result = unit(torch.full((1, 1, 1, 1, 1), 3.0)).item()
        assert result == pytest.approx(3 if first else 1, rel=1e-4)


def test_the_pyramid_sees_its_rates_and_the_mean() -> None:
    torch.manual_seed(0)
    pyramid = AtrousPyramid(1, 2).eval()
    seen = []
    for weight in (0.0, 1.0):
        pyramid.pooled.weight.data.fill_(weight)
        pyramid.pooled.bias.data.fill_(1)
        image = torch.rand(1, 1, 15, 1, 1).requires_grad_()
        pyramid(image)[0, :, 7].sum().backward()
        seen.append(image.grad[0, 0, :, 0, 0].nonzero().flatten().tolist())
    assert set(seen[0]) == {7 + sign * rate for rate in (0, 2, 4, 6) for sign in (1, -1)}
    assert seen[1] == list(range(15))


def test_deeplab_interpolates_its_logits_between_blocks_of_its_stride() -> None:
    torch.manual_seed(0)
    network = build_network(tiny("deeplabv3")).eval()
    with torch.no_grad():
        line = network(torch.rand(1, 3, 16, 16, 16))[0, :, :, 8, 8]
    bends = line[:, 2:] - 2 * line[:, 1:-1] + line[:, :-2]  # of voxels 1 to 14
    # The centres of the blocks are at 1.5, 5.5, 9.5 and 13.5; between them the logits are linear.
    between = [x - 1 for x in (3, 4, 7, 8, 11, 12)]
    torch.testing.assert_close(bends[:, between], torch.zeros(5, 6), atol=1e-5, rtol=0)
    assert bends.abs().max() > 1e-3


def test_unet_plus_plus_is_monais_with_the_same_weights() -> None:
    network = lively_network(tiny("unetplusplus"))
    assert isinstance(network, UNetPlusPlus)
    monai = BasicUNetPlusPlus(
        3, 3, 5, (4, 6, 8, 10, 12, 4), act="relu", norm="batch", deep_supervision=True
    ).eval()
    missing = monai.load_state_dict(network.network.state_dict(), strict=False)
    layers = {f"final_conv_0_{n}.{part}" for n in (1, 2, 3) for part in ("weight", "bias")}
    assert (set(missing.missing_keys), missing.unexpected_keys) == (layers, [])
    image = torch.randn(1, 3, 16, 32, 16)
    with torch.no_grad():
        assert torch.equal(network(image), monai(image)[-1])
    assert network.head is network.network.final_conv_0_4


def test_it_needs_monai(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "monai.networks.nets.basic_unetplusplus", None)
    with pytest.raises(DependencyError, match="network unetplusplus needs MONAI"):
        UNetPlusPlus(tiny("unetplusplus"))
    rows = {row[0]: row[1:] for row in summary_rows(network_costs())}
    assert rows["U-Net++"] == ("-", "-", "-", "-")
    assert rows["DeepLab-V3"] == ("1.491", "-", "11.18", "-")


def run_graph(content: bytes, image: Tensor) -> Tensor:
    session = import_onnxruntime().InferenceSession(content, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"image": image.numpy()})[0])


@pytest.mark.parametrize("name", RELATED)
def test_the_exported_graph_is_the_network_at_any_size(name: Architecture) -> None:
    network = lively_network(tiny(name))
    content = export_onnx(network).content
    for shape in ((1, 3, 16, 32, 48), (2, 3, 32, 16, 16)):
        image = torch.randn(shape)
        with torch.no_grad():
            expected = network(image)
        assert expected.std() > 0.01
        difference = (run_graph(content, image) - expected).abs().max()
        assert difference < 1e-5 * expected.abs().max()


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("residualunet", "Residual U-Net for BraTS brain tumours"),
        ("deeplabv3", "DeepLab-V3 for BraTS brain tumours"),
        ("unetplusplus", "U-Net++ for BraTS brain tumours"),
    ],
)
def test_a_model_has_the_name_of_its_network(name: str, title: str) -> None:
    found = _describe(MODELS[name], BRATS)
    assert (found.name, found.description) == (f"brats-brain-tumours-{name}", title)
