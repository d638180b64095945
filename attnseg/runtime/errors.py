"""The exceptions of attnseg, one tree.

    AttnsegError            everything that the user can mend; the command line prints one line
    ├── ConfigError         an option or field with a value that is not allowed
    ├── ScanError           a scan folder that holds no usable case, or an incomplete one
    │   └── VolumeError     a scan file that cannot be read or whose content is not an image
    ├── BundleError         a bundle that is missing, damaged, or of an unknown format
    ├── EngineError         an inference engine that is missing or refuses the model
    │   ├── MismatchError   an engine that does not compute what the trained network computes
    │   ├── NotHereError    an engine that this machine has not, or that is for another machine
    │   ├── OutOfMemoryError  a device that has less memory than the volume takes
    │   └── DeviceLostError a device that does nothing more for this process
    ├── OutputError         a result that could not be written, or would replace another
    ├── TrainingError       a training run that cannot start or go on
    └── ExportError         a model that cannot be exported, or whose export is not equal to it

Each message names the thing, the rule it broke and what to do about it.
"""

from __future__ import annotations


class AttnsegError(Exception):
    """Base of every error that a user can mend."""


class ConfigError(AttnsegError):
    """An option or field has a value that is not allowed."""


class ScanError(AttnsegError):
    """A scan folder holds no usable case, or an incomplete one."""


class VolumeError(ScanError):
    """A scan file cannot be read, or is not a 3-D image of finite numbers."""


class BundleError(AttnsegError):
    """A bundle is missing, damaged, or of a format this version does not know."""


class EngineError(AttnsegError):
    """An inference engine is not installed, or refuses the model."""


class MismatchError(EngineError):
    """An engine gives other logits on the golden window than the trained network gave."""


class NotHereError(EngineError):
    """This machine has no GPU or not the library, or the engine is for another GPU or window."""


class OutOfMemoryError(EngineError):
    """The device has not enough memory."""


class DeviceLostError(EngineError):
    """The device failed in a way that nothing in this process can use it any more."""


class OutputError(AttnsegError):
    """A result could not be written, or would replace another; no partial file stays."""


class TrainingError(AttnsegError):
    """A training run cannot start or go on."""


class ExportError(AttnsegError):
    """A model cannot be exported, or the export does not compute what the model computes."""
