from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from attnseg.runtime.case.volume import Volume
from attnseg.runtime.errors import ConfigError, DependencyError
from attnseg.runtime.steps.preprocess import preprocess
from attnseg.synthetic import make_case
from attnseg.trainer.baselines import DeepMedic, UNet3d
from attnseg.trainer.loss import segmentation_loss
from attnseg.trainer.model import MODELS, Cbam, DilatedConv, NetworkConfig, network_settings
from attnseg.trainer.networks import build_network, count_macs, count_parameters
from tests.conftest import PLAIN

TINY_WIDTHS = dict.fromkeys(MODELS, ((8, 16), 16)) | {
    "deepmedic": ((4,) * 8, 8),
    "unetplusplus": ((4, 4, 8, 8), 8),
}
TINY = {
    **{n: replace(MODELS[n], widths=w, bottleneck=b) for n, (w, b) in TINY_WIDTHS.items()},
    **{a: NetworkConfig(widths=(8, 16), bottleneck=16, attention=a) for a in ("se", "cbam")},
}


def parameters_of(module: nn.Module, kind: type[nn.Module]) -> int:
    return sum(count_parameters(m) for m in module.modules() if isinstance(m, kind))


def test_the_3d_unet_has_the_parameters_that_its_authors_state() -> None:
    # Cicek et al. (2016), section 2: "In total, the architecture has 19069955 parameters". They
    # count neither batch norms nor the biases of the transposed convolutions.
    network = UNet3d(NetworkConfig(3, 3, (64, 128, 256), 512, "none", False, "unet3d"))
    norms = parameters_of(network, nn.BatchNorm3d)
    biases = sum(up.bias.numel() for up in network.up)
    channels = (32, 64, 64, 128, 128, 256, 256, 512, 256, 256, 128, 128, 64, 64)
    assert (norms, biases) == (2 * sum(channels), 512 + 256 + 128)
    assert count_parameters(network) - norms - biases == 19_069_955


def test_the_parameters_of_deepmedic_by_hand() -> None:
    widths = (2, 2, 4, 4, 6, 6, 8, 8)
    network = DeepMedic(NetworkConfig(3, 5, widths, 10, "none", False, "deepmedic"))
    # Each layer: kernel, bias, and the two values per channel of its batch norm.
    pathway = sum(27 * c_in * c_out + 3 * c_out for c_in, c_out in pairwise((3, *widths)))
    joint = (16 * 10 + 3 * 10) + (10 * 10 + 3 * 10)
    head = 10 * 5 + 5
    assert count_parameters(network) == 2 * pathway + joint + head


def test_deepmedic_is_eleven_layers_deep() -> None:
    network = DeepMedic(MODELS["deepmedic"])
    for pathway in (network.fine, network.coarse):
        kernels = [m.kernel_size for m in pathway.modules() if isinstance(m, nn.Conv3d)]
        assert kernels == [(3, 3, 3)] * 8
    kernels = [m.kernel_size for m in network.joint.modules() if isinstance(m, nn.Conv3d)]
    assert kernels == [(1, 1, 1)] * 2
    assert network.head.kernel_size == (1, 1, 1)


def test_the_coarse_pathway_sees_four_times_as_far() -> None:
    # Eight 3x3x3 layers reach 8 voxels; on means of 4 voxels they reach 8 blocks of 4.
    network = DeepMedic(TINY["deepmedic"]).eval()
    for parameter in network.parameters():
        parameter.data.fill_(0.1)
    image = torch.zeros(1, 4, 80, 4, 4, requires_grad=True)
    network(image)[:, :, 40].sum().backward()
    seen = image.grad[0].abs().sum((0, 2, 3)).nonzero().flatten()
    assert seen.tolist() == list(range(40 - 32, 44 + 32))


def test_a_window_costs_about_as_much_in_every_row_of_the_table() -> None:
    costs = {n: count_macs(build_network(MODELS[n]), 32) for n in MODELS}
    own = count_macs(build_network(MODELS["attnresunet"]), 32)
    assert all(0.8 < cost / own < 1.25 for cost in costs.values()), costs


@pytest.mark.parametrize("name", TINY)
def test_each_network_gives_logits_of_the_inputs_size(name: str) -> None:
    config = replace(TINY[name], in_channels=3, classes=5)
    network = build_network(config)
    assert network.config is config
    stride = 16 if name == "unetplusplus" else 4
    assert config.stride == stride
    shape = (2 * stride, 3 * stride, 4 * stride)
    assert network(torch.zeros(2, 3, *shape)).shape == (2, 5, *shape)


@pytest.fixture(scope="module")
def patch() -> tuple[Tensor, Tensor]:
    """One normalised patch of a phantom, with the whole of its tumour."""
    case = make_case(11, (64, 72, 56))
    scan = preprocess(Volume(case.images, case.affine), PLAIN)
    labels = np.array([0, 1, 2, 0, 3])[case.labels[scan.box.slices()]]
    centre = np.argwhere(labels > 0).mean(axis=0).astype(int)
    low = [min(max(0, c - 16), n - 32) for c, n in zip(centre, labels.shape, strict=True)]
    box = tuple(slice(start, start + 32) for start in low)
    return torch.from_numpy(scan.image[(slice(None), *box)])[None], torch.from_numpy(labels[box])


@pytest.mark.parametrize("name", TINY)
def test_each_network_learns_a_phantom(name: str, patch: tuple[Tensor, Tensor]) -> None:
    torch.manual_seed(0)
    network = build_network(TINY[name]).train()
    cut = slice(None) if network.config.stride == 16 else slice(4, 28)
    image, labels = (part[..., cut, cut, cut] for part in patch)
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = segmentation_loss(network(image), labels[None])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architecture": "vnet"}, "should be 'attnresunet', .* or 'unetplusplus'"),
        ({"architecture": "unet3d"}, "unet3d has no attention and no multi-scale module"),
        (
            {"architecture": "deepmedic", "attention": "none", "multi_scale": False},
            r"deepmedic needs 8 widths, got \(12, 24, 48, 96\)",
        ),
        ({"architecture": "deeplabv3"}, "deeplabv3 has no attention and no multi-scale module"),
        (
            {
                "architecture": "unetplusplus",
                "attention": "none",
                "multi_scale": False,
                "widths": [8, 16],
            },
            r"unetplusplus needs 4 widths, got \(8, 16\)",
        ),
    ],
    ids=str,
)
def test_what_a_baseline_does_not_have_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        NetworkConfig.from_dict(fields)


def test_a_network_that_needs_monai_says_so_where_it_is_not_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "monai.networks.nets.basic_unetplusplus", None)
    with pytest.raises(DependencyError, match="network unetplusplus needs MONAI; "):
        build_network(TINY["unetplusplus"])


def test_models_and_presets_are_found_by_name() -> None:
    assert network_settings(None, None) == NetworkConfig()
    assert network_settings("deepmedic", None) is MODELS["deepmedic"]
    assert network_settings("attnresunet", "wide16").widths == (16, 32, 64, 128)
    for model, preset, message in (
        (
            "vnet",
            None,
            "vnet does not exist; choose unet3d, deepmedic, .*, unetplusplus, resunet, attnresunet",
        ),
        (None, "huge", "preset huge does not exist; choose paper, wide16"),
        ("unet3d", "paper", "preset paper is for attnresunet, not for unet3d"),
    ):
        with pytest.raises(ConfigError, match=message):
            network_settings(model, preset)


def test_cbam_by_hand() -> None:
    ln3 = float(np.log(3))  # sigmoid(ln 3) = 0.75
    module = Cbam(2)
    for parameter in module.parameters():
        parameter.data.zero_()
    module.squeeze.weight.data.fill_(1)
    module.excite.weight.data.view(-1).copy_(torch.tensor([ln3 / 5, -ln3 / 5]))
    module.spatial.weight.data[0, :, 3, 3, 3] = torch.tensor([-48 * ln3, 28 * ln3])
    # Two channels of two voxels: means 1 and 1, peaks 2 and 1, which the shared layers sum to
    # 2 and 3, together 5: logits ln 3 and -ln 3, weights 0.75 and 0.25.
    features = torch.tensor([[0.0, 2.0], [1.0, 1.0]]).view(1, 2, 2, 1, 1)
    torch.testing.assert_close(module.weights(features).view(2), torch.tensor([0.75, 0.25]))
    # Weighted: (0, 1.5) and (0.25, 0.25). Along the channels the means are 0.125 and 0.875, the
    # peaks 0.25 and 1.5: logits (7 - 6) ln 3 and (42 - 42) ln 3, weights 0.75 and 0.5.
    expected = torch.tensor([[0.0, 0.75], [0.1875, 0.125]])
    torch.testing.assert_close(module(features).view(2, 2), expected)


def test_cbam_looks_three_voxels_around() -> None:
    torch.manual_seed(0)
    module = Cbam(4)
    module.excite.weight.data.zero_()  # so that no voxel acts through the channels' weights
    features = torch.rand(1, 4, 9, 9, 9, requires_grad=True)
    module(features)[0, :, 4, 4, 4].sum().backward()
    reach = features.grad[0].abs().sum(0)
    assert reach[1:8, 1:8, 1:8].all()
    assert not reach[0].any() and not reach[8].any()


@contextmanager
def counted_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[None]]:
    """Calls of torch's own dilated convolution."""
    real, calls = nn.Conv3d.forward, []

    def forward(layer: nn.Conv3d, h: Tensor) -> Tensor:
        calls.append(None)
        return real(layer, h)

    with monkeypatch.context() as patched:
        patched.setattr(nn.Conv3d, "forward", forward)
        yield calls


@pytest.mark.parametrize(
    ("dilation", "shape", "apart"),
    [
        (2, (8, 8, 8), True),
        (2, (8, 10, 12), True),
        (4, (16, 16, 20), True),
        (2, (9, 8, 8), False),
        (4, (16, 18, 16), False),
        (4, (8, 8, 8), False),
        (2, (7, 5, 3), False),
    ],
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
def test_a_dilated_convolution_taken_apart_is_torchs_with_its_gradients(
    monkeypatch: pytest.MonkeyPatch,
    dilation: int,
    shape: tuple[int, int, int],
    apart: bool,
    memory_format: torch.memory_format,
) -> None:
    torch.manual_seed(0)
    layer = DilatedConv(3, 5, 3, padding=dilation, dilation=dilation).train()
    image = torch.randn(2, 3, *shape).to(memory_format=memory_format).requires_grad_()
    inputs = (image, layer.weight, layer.bias)
    with counted_calls(monkeypatch) as calls:
        result = layer(image)
    assert bool(calls) is not apart
    expected = nn.functional.conv3d(image, *inputs[1:], padding=dilation, dilation=dilation)
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)
    slope = torch.randn_like(expected)
    got, wanted = (torch.autograd.grad(y, inputs, slope) for y in (result, expected))
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-4)


def test_a_dilated_convolution_is_torchs_own_outside_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer = DilatedConv(1, 1, 3, padding=2, dilation=2).eval()
    with counted_calls(monkeypatch) as calls:
        layer(torch.zeros(1, 1, 8, 8, 8))
    assert len(calls) == 1
