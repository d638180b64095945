"""Start of a training run: configuration, split and data set from the user's choices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from attnseg.data.labelled import refuse_data_folder
from attnseg.data.split import read_split
from attnseg.runtime.errors import ConfigError, Setting, TrainingSetting
from attnseg.runtime.results.output import check_folder
from attnseg.trainer.checkpoint import checkpoint_config, load_run
from attnseg.trainer.config import TrainConfig
from attnseg.trainer.data_set import DataSet, open_data_set
from attnseg.trainer.loop import train
from attnseg.trainer.model import network_settings

_PAPER_PROTOCOL = {"resize": "192,192,128"}
"""Settings of the paper's section 3.3 that are not defaults."""


@dataclass(frozen=True)
class RunChoices:
    """Choices that define a run; None stands for the default.

    Attributes:
        preset: `paper` for the complete protocol of section 3.3, or `wide16` for a wider network.
        model: Key of `MODELS`, such as `unet3d`.
        attention: Attention on the skip connections: `none`, `gap`, `se` or `cbam`.
        multi_scale: Whether the decoder has dilated convolutions.
        split: JSON file with lists `train` and `validation` of case names.
        initial: Checkpoint or `weights.safetensors` to start from.
        settings: Fields of `TrainConfig` as text.
    """

    preset: str | None = None
    model: str | None = None
    attention: str | None = None
    multi_scale: bool | None = None
    split: Path | None = None
    initial: Path | None = None
    settings: Mapping[str, str] = field(default_factory=dict)

    def _text_settings(self) -> dict[str, str]:
        """`settings`, completed by the fields `attention` and `multi_scale`."""
        chosen = dict(self.settings)
        onoff = None if self.multi_scale is None else str(self.multi_scale)
        for name, value in {"attention": self.attention, "multi_scale": onoff}.items():
            if value is None:
                continue
            if name in self.settings:
                raise ConfigError(
                    f"{name} was given twice",
                    "leave {} or {} out",
                    Setting(name),
                    TrainingSetting(name),
                )
            chosen[name] = value
        if self.model == "resunet" and (self.attention not in (None, "none") or self.multi_scale):
            raise ConfigError(
                "resunet is the network without attention and multi-scale module",
                "give {} with {} or {} for one part of it",
                Setting("model", "attnresunet"),
                Setting("multi_scale", False),
                Setting("attention", "none"),
            )
        return chosen

    def config(self) -> TrainConfig:
        """Return the configuration of a new run.

        Raises:
            ConfigError: A choice does not exist, or choices contradict each other.
        """
        settings = self._text_settings()
        if self.preset == "paper" and "spacing_mm" not in settings:
            settings = _PAPER_PROTOCOL | settings
        config = TrainConfig(network_settings(self.model, self.preset)).with_settings(settings)
        if self.split and config.folds:
            raise ConfigError(
                "a split and folds were given, which both make the split",
                "leave {} or {} out",
                Setting("split"),
                TrainingSetting("folds"),
            )
        return config

    def refuse_for_resume(self) -> None:
        """Raise `ConfigError` if any choice was made."""
        if self != RunChoices():
            raise ConfigError(
                "a resumed run keeps its own configuration, split and weights",
                "leave every other choice out, or start a new run in another folder",
            )


def open_choices(data: Path, choices: RunChoices) -> tuple[DataSet, TrainConfig]:
    """Open the data set of a new run, and return it with the configuration.

    Raises:
        ConfigError: Choices contradict each other.
        ScanError, TrainingError: See `open_data_set`.
    """
    config = choices.config()
    split = read_split(choices.split) if choices.split else None
    return open_data_set(data, split, config), config


def start_run(
    data: Path, output: Path, choices: RunChoices | None = None, resume: bool = False
) -> Path:
    """Train a network from the start, or resume a run.

    Args:
        data: Folder of labelled cases.
        output: Folder of the run.
        choices: Choices that define the run; a resumed run keeps its own.
        resume: Whether to resume the run in `output`.

    Returns:
        File of the best checkpoint.

    Raises:
        ConfigError: Choices contradict each other, or were made for a resumed run.
        OutputError: `output` is a file or a dangling link.
        ScanError, TrainingError: See `attnseg.trainer.loop.train` and `open_data_set`.
    """
    choices = choices or RunChoices()
    refuse_data_folder(data, output)
    check_folder(output)
    if not resume:
        data_set, config = open_choices(data, choices)
        return train(data_set, config, output, initial=choices.initial)
    choices.refuse_for_resume()
    stored = load_run(output)
    config = checkpoint_config(stored)
    return train(open_data_set(data, stored["split"], config), config, output, stored)
