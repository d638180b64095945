from __future__ import annotations

import json
import sys

import pytest
from onnx import TensorProto, helper

from attnseg.export.engines.checks import check_engine_weights, check_inspected, weight_bytes
from attnseg.export.engines.tensorrt import BuildOptions, build_engine, check_options, parse_target
from attnseg.export.engines.worker import build_apart
from attnseg.export.graphs.fp16 import convert_to_fp16
from attnseg.export.graphs.graph import Graph
from attnseg.export.source.onnx import export_onnx
from attnseg.runtime.engines.tensorrt import LIBRARIES
from attnseg.runtime.errors import ConfigError, ExportError
from attnseg.trainer.model import NetworkConfig
from tests.export.conftest import lively_network

WINDOW = (16, 16, 16)
SM86 = BuildOptions("tensorrt-rtx", "sm86")


@pytest.fixture(scope="module")
def fp32_graph() -> Graph:
    return export_onnx(lively_network(NetworkConfig(3, 5, (8, 16), 16)))


@pytest.fixture(scope="module")
def fp16_graph(fp32_graph: Graph) -> Graph:
    return convert_to_fp16(fp32_graph)


@pytest.mark.parametrize(
    "name", ["rtx3090", "RTX 3090", "NVIDIA GeForce RTX 3090", "sm86", "sm_86", "8.6", "86"]
)
def test_a_target_is_known_by_what_people_call_it(name: str) -> None:
    assert parse_target(name, "tensorrt-rtx") == "sm86"


@pytest.mark.parametrize("name", ["gtx1080", "sm61", "sm90", "rtx", "", "3090ti"])
def test_a_target_that_does_not_exist_is_refused_with_those_that_do(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"target {name} .* choose .*rtx3090.* sm86.* sm120"):
        parse_target(name, "tensorrt-rtx")


def test_tensorrt_builds_for_gpus_that_tensorrt_rtx_does_not() -> None:
    assert parse_target("sm90", "tensorrt") == "sm90"


def test_an_engine_is_built_without_a_gpu_and_is_the_same_each_time(fp16_graph: Graph) -> None:
    first, second = (build_engine(fp16_graph, WINDOW, SM86) for _ in range(2))
    assert first.content == second.content
    build = first.build
    assert (build.builder, build.target, build.window, build.batch) == (
        "tensorrt-rtx",
        "sm86",
        WINDOW,
        12,
    )
    assert "Half" in first.log


def test_targets_and_batches_give_other_engines(fp16_graph: Graph) -> None:
    engines = [
        build_engine(fp16_graph, WINDOW, BuildOptions("tensorrt-rtx", target, batch)).content
        for target, batch in (("sm86", 1), ("sm89", 1), ("sm86", 4))
    ]
    assert len(set(engines)) == 3


def test_a_portable_engine_is_built_and_is_another(fp16_graph: Graph) -> None:
    options = BuildOptions("tensorrt-rtx", "sm80", compatibility="ampere+")
    first, second = (build_engine(fp16_graph, WINDOW, options) for _ in range(2))
    assert first.content == second.content
    assert (first.build.target, first.build.compatibility) == ("sm80", "ampere+")
    targeted = build_engine(fp16_graph, WINDOW, BuildOptions("tensorrt-rtx", "sm80"))
    assert first.content != targeted.content


def test_an_fp16_engine_is_half_as_large(fp32_graph: Graph, fp16_graph: Graph) -> None:
    def weights(log: str) -> int:
        return int(log.split("Total Weights Memory: ")[-1].split()[0])

    one = BuildOptions("tensorrt-rtx", "sm86", batch=1)
    full, half = (build_engine(g, WINDOW, one).log for g in (fp32_graph, fp16_graph))
    assert 0.4 < weights(half) / weights(full) < 0.6


def test_turing_runs_fp16_only_and_is_told_so(fp32_graph: Graph, fp16_graph: Graph) -> None:
    turing = BuildOptions("tensorrt-rtx", "sm75")
    assert build_engine(fp16_graph, WINDOW, turing).build.target == "sm75"
    # Separate process: after this failure, TensorRT-RTX 1.7 builds the next target as Turing.
    with pytest.raises(ExportError, match=r"sm75: .*FP32 3D .*; this GPU needs fp16=True"):
        build_apart(fp32_graph, WINDOW, turing)


def test_an_engine_with_the_weights_of_fp32_is_refused() -> None:
    exact = export_onnx(lively_network(NetworkConfig(3, 5, (32, 64), 96)))
    log = build_engine(exact, WINDOW, SM86).log
    check_engine_weights(log, weight_bytes(exact))
    with pytest.raises(ExportError, match="was not built in the graph's precision"):
        check_engine_weights(log, weight_bytes(convert_to_fp16(exact)))


def inspected(key: str, *kinds: tuple[str, str, str]) -> str:
    layers = [
        {"Name": f"layer{n}", "LayerType": kind, "Inputs": [{key: took}], "Outputs": [{key: gave}]}
        for n, (kind, took, gave) in enumerate(kinds)
    ]
    return json.dumps({"Layers": layers})


@pytest.mark.parametrize(
    ("key", "fp32", "fp16"),
    [
        ("DataType", "Float", "Half"),
        (
            "Format/Datatype",
            "Row major linear FP32 format",
            "Channel major FP16 format where channel % 8 == 0",
        ),
    ],
)
def test_the_inspectors_words_for_an_fp32_convolution_are_read(
    key: str, fp32: str, fp16: str
) -> None:
    convolution, cast = ("CaskConvolution", fp16, fp16), ("Reformat", fp32, fp32)
    first, last = ("CaskConvolution", fp32, fp16), ("CaskConvolution", fp16, fp32)
    check_inspected(inspected(key, cast, first, convolution, last), ())
    grown = inspected(key, convolution, ("CaskDeconvolutionV2", fp32, fp32))
    check_inspected(grown, ["layer1"])
    with pytest.raises(ExportError, match="holds convolutions in fp32: layer1"):
        check_inspected(grown, ())


def test_a_convolution_that_tensorrt_reads_as_fp32_is_refused(fp32_graph: Graph) -> None:
    mixed = convert_to_fp16(fp32_graph, ["node_conv3d_3"])
    with pytest.raises(ExportError, match="reads node_conv3d_3 of the fp16 graph as fp32"):
        build_engine(mixed, WINDOW, SM86)
    build_engine(mixed, WINDOW, SM86, in_fp32=("node_conv3d_3",))


def test_the_build_tells_how_far_it_is(fp16_graph: Graph) -> None:
    told: list[tuple[str, int, int]] = []
    build_engine(fp16_graph, WINDOW, SM86, progress=lambda *step: told.append(step))
    assert told[0][:2] == ("Building engine", 0)
    assert all(0 <= done <= steps for _, done, steps in told)
    whole = [(done, steps) for phase, done, steps in told if phase == "Building engine"]
    assert whole[-1][0] == whole[-1][1] > 1


def test_too_little_workspace_is_said_in_words(fp16_graph: Graph) -> None:
    options = BuildOptions("tensorrt-rtx", "sm86", workspace_bytes=1000)
    with pytest.raises(ExportError, match=r"sm86: .*workspace.*; give a larger workspace") as e:
        build_engine(fp16_graph, WINDOW, options)
    assert "\n" not in str(e.value)


def test_a_window_that_the_network_does_not_take_is_refused(fp16_graph: Graph) -> None:
    with pytest.raises(ExportError, match="could not build for sm86"):
        build_engine(fp16_graph, (18, 16, 16), SM86)


def test_an_operator_that_tensorrt_does_not_know_is_named() -> None:
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT16, ["b", 4, 16, 16, 16])
        for name in ("image", "logits")
    ]
    foo = helper.make_node("Foo", ["image"], ["logits"], name="foo1", domain="mine")
    graph = helper.make_graph([foo], "g", ends[:1], ends[1:])
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("mine", 1)]
    content = Graph(helper.make_model(graph, opset_imports=opsets))
    with pytest.raises(ExportError, match=r"operator Foo, node foo1\); export with builder="):
        build_engine(content, WINDOW, SM86)


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt-rtx"])
def test_a_builder_that_is_missing_names_the_extra(
    name: str, fp16_graph: Graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, LIBRARIES[name], None)
    with pytest.raises(ExportError, match=rf"builder {name} is not installed; pip install"):
        build_engine(fp16_graph, WINDOW, BuildOptions(name, "sm86"))  # type: ignore[arg-type]


def test_what_tensorrt_rtx_cannot_do_is_refused_before_the_build() -> None:
    for options, message in (
        (BuildOptions("tensorrt-rtx", "sm86", compatibility="ampere+"), "leave target out"),
        (BuildOptions("tensorrt-rtx", "sm86", version_compatible=True), "give builder='tensorrt'"),
        (
            BuildOptions("tensorrt-rtx", "sm86", timing_cache="t"),
            "takes no timing cache; give",
        ),
        (BuildOptions("tensorrt", "sm86", timing_cache="/gone/t"), "its folder does not exist"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_options(options)
