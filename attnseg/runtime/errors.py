"""Exceptions of attnseg, in one class hierarchy.

    AttnsegError            any error that the user can fix; the command line prints one line
    ├── ConfigError         an option or field with an invalid value
    ├── DependencyError     an optional dependency that is not installed
    ├── ScanError           a scan folder without a usable case, or an incomplete case
    │   └── VolumeError     a scan file that cannot be read, or whose content is not an image
    ├── BundleError         a bundle that is missing, damaged or in an unknown format
    ├── EngineError         an inference engine that is missing, rejects the model or fails
    │   ├── MismatchError   an engine whose logits differ from the trained network's
    │   ├── UnavailableError  an engine unavailable on this machine
    │   ├── OutOfMemoryError  insufficient device memory
    │   └── DeviceLostError   an unusable CUDA context; restart the process
    ├── ResourceError       a process without enough memory, threads or open files
    ├── OutputError         a result that cannot be written or would overwrite another
    ├── TrainingError       a training run that cannot start or continue
    └── ExportError         a model that cannot be exported, or an export that differs from it

An error stores its cause and its mend (the suggested fix) separately. The mend names settings of
the Python interface; the command line prints the same settings as command-line options.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

_LONGEST_CAUSE = 4000  # characters; a path has 4,096 bytes at most, a value of others any number
SLOT = "{}"
"""Placeholder for a setting in the text of a mend."""


@dataclass(frozen=True)
class Setting:
    """A setting named in the mend of an error.

    Attributes:
        name: Name of the field or argument in Python.
        value: Suggested value; None if only the name is shown.
    """

    name: str
    value: Any = None

    def __str__(self) -> str:
        """The setting in Python notation, such as `device='cpu'`."""
        return self.name if self.value is None else f"{self.name}={self.value!r}"


class TrainingSetting(Setting):
    """A field of `attnseg.trainer.config.TrainConfig`."""


class ChannelSetting(Setting):
    """The file of a channel, by the channel's name."""


class AttnsegError(Exception):
    """Base class of all errors that a user can fix.

    Attributes:
        cause: Cause of the error: the argument, the rule and the value received; a long value is
            shortened.
        mend: Suggested fix, empty if unknown; the last `{}` are replaced by
            `settings`.
        settings: Settings named in the mend, in order.
    """

    def __init__(self, cause: str, mend: str = "", *settings: Setting) -> None:
        if len(cause) > _LONGEST_CAUSE:
            half = _LONGEST_CAUSE // 2
            cause = f"{cause[:half]} [...] {cause[-half:]}"
        super().__init__(cause, mend, *settings)
        self.cause, self.mend, self.settings = cause, mend, settings

    def describe(self, show: Callable[[Setting], str] = str) -> str:
        """Cause and mend as one string.

        Args:
            show: Function that formats a setting; Python notation by default.
        """
        # The last slots are those of the settings: a name before them may hold braces too.
        count = len(self.settings)
        first, *rest = self.mend.rsplit(SLOT, count) if count else [self.mend]
        shown = (show(s) + text for s, text in zip(self.settings, rest, strict=True))
        mend = first + "".join(shown)
        return f"{self.cause}; {mend}" if mend else self.cause

    def detached(self) -> Self:
        """A copy without traceback and cause, whose frames keep arrays and engines alive."""
        return type(self)(self.cause, self.mend, *self.settings)

    def __str__(self) -> str:
        return self.describe()


class ConfigError(AttnsegError):
    """An option or field has an invalid value."""


class DependencyError(AttnsegError):
    """An optional dependency is not installed; the mend names the extra that installs it."""


class ScanError(AttnsegError):
    """A scan folder holds no usable case, or a case is incomplete."""


class VolumeError(ScanError):
    """A scan file cannot be read, or is not a 3-D image of finite numbers."""


class BundleError(AttnsegError):
    """A bundle is missing, damaged, or in a format unknown to this version."""


class EngineError(AttnsegError):
    """An inference engine is not installed, rejects the model, or failed."""


class MismatchError(EngineError):
    """The logits of an engine for the golden window differ from the trained network's."""


class UnavailableError(EngineError):
    """An engine is unavailable on this machine: no GPU, no library, or built for another GPU."""


class OutOfMemoryError(EngineError):
    """The device has too little memory."""


class DeviceLostError(EngineError):
    """The CUDA context is unusable; restart the process."""


class ResourceError(AttnsegError):
    """A limit of the process is reached: on memory, threads or open files."""


class OutputError(AttnsegError):
    """A result cannot be written or would overwrite another; no partial file remains."""


class TrainingError(AttnsegError):
    """A training run cannot start or continue."""


class ExportError(AttnsegError):
    """A model cannot be exported, or the output of the export differs from the model's."""
