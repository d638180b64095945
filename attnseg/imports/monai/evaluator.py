"""Evaluator of a MONAI bundle: the sections that MONAI runs, and the weights that it loads.

The import reads the sections `network_def`, `preprocessing`, `inferer` and `postprocessing`, and
`models/model.pt`. MONAI runs what the evaluator refers to, which must therefore be these.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from attnseg.imports.monai.config import Component, Config
from attnseg.runtime.errors import ExportError

WEIGHTS = ("models", "model.pt")
"""Folder and name of the file of weights."""
_OWN_NETWORK = re.compile(r"@network|\$?\s*@network_def(?:\.(?:to|eval)\([^()]*\))*\s*")


def check_evaluator(config: Config) -> None:
    """Refuse an evaluator that runs other sections than those that are read.

    Raises:
        ExportError: The evaluator has a network, an inferer or transforms of its own, or a function
            that changes what is done with them.
    """
    network = config.section("network")
    if isinstance(network, str) and not _OWN_NETWORK.fullmatch(network):
        raise ExportError(
            f"{config.path}: network is {network[:160]}, not @network_def",
            "import the network that network_def names",
        )
    raw = config.section("evaluator")
    if raw is None:
        return
    step = Component(config, raw, "evaluator")
    if step.name != "SupervisedEvaluator":
        step.refuse("is not supported", "import bundles with SupervisedEvaluator")
    used = step.raw("network")
    if used is not None and not _OWN_NETWORK.fullmatch(str(used)):
        step.refuse(f"has network {str(used)[:160]}, not @network")
    step.expect_section("inferer")
    step.expect_section("postprocessing")
    dataset = _section(config, _section(config, step.raw("val_data_loader")).get("dataset"))
    if "transform" in dataset:
        data = Component(config, dataset, "dataset of the evaluator")
        data.expect_section("transform", "preprocessing")
    step.ignore("device", "epoch_length", "non_blocking", "val_handlers", "decollate")
    step.ignore("amp", "amp_kwargs", "compile", "compile_kwargs", "event_names", "event_to_attr")
    step.ignore("key_val_metric", "additional_metrics", "metric_cmp_fn")
    step.done()


def _section(config: Config, raw: Any) -> dict[str, Any]:
    """Object that a value refers to; empty if it is none."""
    found = config.lenient().shallow(raw, "evaluator")
    return found if isinstance(found, dict) else {}


def weights_key(config: Config) -> str | None:
    """Entry of the checkpoint that `CheckpointLoader` takes; None if there is no such handler.

    Raises:
        ExportError: A `CheckpointLoader` loads another file than `models/model.pt`, or one of which
            the name is not known; or two load different entries.
    """
    keys = set()
    for step in _loaders(config):
        raw = step.raw("load_path")
        path = config.lenient().shallow(raw, f"{step.field}.load_path")
        if PurePosixPath(str(path)).parts[-2:] != WEIGHTS:
            step.refuse(
                f"has load_path {str(raw)[:160]}, not models/model.pt",
                f"name the weights {'/'.join(WEIGHTS)}",
            )
        loaded = config.lenient().shallow(step.raw("load_dict"), f"{step.field}.load_dict")
        if isinstance(loaded, dict) and loaded:
            keys.add(str(next(iter(loaded))))
    if len(keys) > 1:
        raise ExportError(
            f"{config.path}: CheckpointLoader loads the entries {', '.join(sorted(keys))}; "
            "one is supported"
        )
    return keys.pop() if keys else None


def _loaders(config: Config) -> Iterator[Component]:
    """Every `CheckpointLoader` that is not disabled, wherever it is in the config."""
    left: list[tuple[str, Any]] = [("", config.root)]
    while left:
        field, value = left.pop()
        if isinstance(value, list):
            left += [(f"{field}[{index}]", item) for index, item in enumerate(value)]
        elif isinstance(value, dict):
            left += [(f"{field}.{key}".lstrip("."), item) for key, item in value.items()]
            name = str(value.get("_target_")).rpartition(".")[2]
            disabled = config.lenient().shallow(value.get("_disabled_"), field)
            if name == "CheckpointLoader" and disabled is not True:
                yield Component(config, value, field)
