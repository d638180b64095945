"""Channels, labels and regions of a MONAI bundle, as `metadata.json` names them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnseg.imports.monai.networks import BuiltNetwork
from attnseg.imports.monai.postprocessing import After
from attnseg.runtime.errors import ConfigError, ExportError
from attnseg.runtime.task import BRATS_CHANNELS, Channel, Label, Output, Task, distinct_names

_BRATS_LABELS = {
    "whole tumor": "oedema",
    "tumor core": "necrotic core",
    "enhancing tumor": "enhancing tumour",
}
"""Regions of BraTS, each within the one before, and the label of what the next leaves of it."""


@dataclass(frozen=True)
class Described:
    """Channels and outputs as `metadata.json` names them, and the network counts them."""

    folder: Path
    metadata: dict[str, Any]
    image: str
    built: BuiltNetwork

    def task(self, after: After) -> Task:
        """Channels, labels and regions.

        Raises:
            ExportError: Names are missing, their number is not that of the network's channels, or
                a label does not fit in a byte.
        """
        try:
            return self._task(after)
        except ConfigError as error:
            raise self._error(error.cause, error.mend) from error

    def _task(self, after: After) -> Task:
        channels = self._channels()
        shown = (channels[0].name,)
        if after.threshold is None:
            names = self._names("outputs", "pred", self.built.outputs)
            labels = tuple(Label(name, index) for index, name in enumerate(names))
            return Task(channels, labels, {n.name: (n.value,) for n in labels[1:]}, shown)
        names, written = self._names("outputs", "pred", self.built.outputs), after.written
        if not written and len(names) == 1:
            written = ((0, 1),)
        regions, labels = self._regions(names, written)
        outputs = tuple(
            Output(names[channel], label, (channel,), after.threshold) for channel, label in written
        )
        return Task(channels, labels, regions, shown, "sigmoid", outputs)

    def _regions(
        self, names: Sequence[str], written: Sequence[tuple[int, int]]
    ) -> tuple[dict[str, tuple[int, ...]], tuple[Label, ...]]:
        """Label values of each region, and the labels.

        A region has the label that its channel writes. The metadata do not say whether regions
        contain others, except that those of BraTS do.
        """
        if sorted(channel for channel, _ in written) != list(range(len(names))):
            raise self._error(
                f"postprocessing writes the channels {[channel for channel, _ in written]} of "
                f"{len(names)} as labels; each must be written once",
                "add a Lambdad as that of brats_mri_segmentation",
            )
        values = [label for _, label in written]
        named = {names[channel]: label for channel, label in written}
        regions: dict[str, tuple[int, ...]] = {name: (named[name],) for name in names}
        texts = {label: name for name, label in named.items()}
        if [name.lower() for name in named] == list(_BRATS_LABELS):
            regions = {names[c]: tuple(values[i:]) for i, (c, _) in enumerate(written)}
            texts = dict(zip(values, _BRATS_LABELS.values(), strict=True))
        background = Label("background", 0)
        return regions, (background, *(Label(texts[v], v) for v in sorted(set(values))))

    def _channels(self) -> tuple[Channel, ...]:
        given, count = self._given("inputs", self.image), self.built.channels
        names = self._names("inputs", self.image, count)
        suffixes = [_suffixes(name) for name in given]
        if len(set(suffixes)) < count or count == 1:  # the volumes of one file
            suffixes = [("",)] * count
        return tuple(Channel(*both) for both in zip(names, suffixes, strict=True))

    def _names(self, side: str, key: str, count: int) -> tuple[str, ...]:
        """Names of the channels of an input or output, made distinct."""
        names = self._given(side, key)
        if len(names) == 1:
            names *= count
        if len(names) != count:
            raise self._error(f"names {len(names)} channels of its {side}, the network has {count}")
        return distinct_names(names)

    def _given(self, side: str, key: str) -> list[str]:
        try:
            known = self.metadata["network_data_format"][side]
            own = known[key] if key in known else next(iter(known.values()))
            given = own["channel_def"]
            return [" ".join(str(given[index]).split()) for index in sorted(given, key=int)]
        except (KeyError, TypeError, AttributeError, ValueError, StopIteration) as error:
            raise self._error(f"network_data_format names no channels of its {side}") from error

    def _error(self, cause: str, mend: str = "") -> ExportError:
        return ExportError(f"{self.folder / 'configs' / 'metadata.json'}: {cause}", mend)


def _suffixes(name: str) -> tuple[str, ...]:
    """File-name suffixes of a channel; those of BraTS stand for each other."""
    word = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
    own = (f"_{word}", f"-{word}")
    known = (channel.suffixes for channel in BRATS_CHANNELS)
    return next((suffixes for suffixes in known if own[0] in suffixes), own)
