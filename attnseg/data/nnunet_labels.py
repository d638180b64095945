"""Labels and regions of nnU-Net's `dataset.json`.

Source: `LabelManager` of nnU-Net 2.8.1. `labels` maps names to a value, or to the values of a
region. With regions, the network has an output for each entry but the background, and
`regions_class_order` names the label that each is written as.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from attnseg.runtime.errors import ConfigError
from attnseg.runtime.task import Label, Output

_IGNORE = "ignore"


@dataclass(frozen=True)
class NnUNetLabels:
    """Labels of a data set or model of nnU-Net.

    Attributes:
        labels: Labels, sorted by value, background first.
        regions: Label values of each entry but the background, by name.
        outputs: Regions in the order in which their labels are written; empty without regions.
        ignore: Value of voxels without expert label; None if there are none.
    """

    labels: tuple[Label, ...]
    regions: Mapping[str, tuple[int, ...]]
    outputs: tuple[Output, ...]
    ignore: int | None


def nnunet_labels(stored: Mapping[str, Any]) -> NnUNetLabels:
    """Labels and regions of the content of a `dataset.json`.

    Raises:
        ConfigError: The labels are not those of nnU-Net 2; the message does not name the file.
    """
    given = stored.get("labels")
    if not isinstance(given, Mapping):
        raise ConfigError(
            'its labels is not a mapping of names to numbers, such as {"liver": 1}',
            "write it as nnU-Net 2 does",
        )
    values = {str(name): _values(str(name), value) for name, value in given.items()}
    ignore = values.pop(_IGNORE, None)
    background = next((name for name, own in values.items() if own == (0,)), None)
    if background is None:
        raise ConfigError("no label has the value 0", 'add "background": 0 to labels')
    regions = {name: own for name, own in values.items() if set(own) != {0}}
    overlap = any(len(own) > 1 for own in values.values())
    single = {own[0]: name for name, own in regions.items() if len(own) == 1}
    if not overlap:
        _refuse_twice([own[0] for own in values.values()])
    numbers = sorted({value for own in regions.values() for value in own} - {0})
    named = (Label(single.get(value, f"label {value}"), value) for value in numbers)
    return NnUNetLabels(
        labels=(Label(background, 0), *named),
        regions=regions,
        outputs=_outputs(stored.get("regions_class_order"), list(regions)) if overlap else (),
        ignore=ignore[0] if ignore else None,
    )


def _values(name: str, value: Any) -> tuple[int, ...]:
    own = tuple(value) if isinstance(value, list) and name != _IGNORE else (value,)
    if not own or any(type(v) is not int for v in own):
        raise ConfigError(
            f"label {name} has the value {value!r}",
            "give it a whole number, or a list of them for a region",
        )
    return own


def _refuse_twice(values: list[int]) -> None:
    for value, count in Counter(values).items():
        if count > 1:
            raise ConfigError(f"lists {value} twice", "make each entry unique")


def _outputs(order: Any, regions: list[str]) -> tuple[Output, ...]:
    """Label of each region, in the order of `regions_class_order`."""
    if not isinstance(order, list) or any(type(label) is not int for label in order):
        raise ConfigError(
            f"has regions ({', '.join(regions)}), and regions_class_order is {order!r}",
            "list the label that each region is written as",
        )
    if len(order) != len(regions):
        raise ConfigError(
            f"regions_class_order has {len(order)} entries for {len(regions)} regions "
            f"({', '.join(regions)})",
            "list one label for each region",
        )
    pairs = zip(regions, order, strict=True)
    return tuple(Output(name, label, (index,)) for index, (name, label) in enumerate(pairs))
