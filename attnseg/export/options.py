"""Export settings as a user specifies them, resolved to `ExportOptions`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from attnseg.export.engines.tensorrt import (
    PORTABLE_TARGET,
    Builder,
    BuildOptions,
    check_machine,
    check_options,
    parse_target,
)
from attnseg.export.export import ExportOptions
from attnseg.export.gate.budget import make_budget
from attnseg.runtime.cuda.gpu import find_gpu
from attnseg.runtime.errors import ConfigError, EngineError, Setting
from attnseg.runtime.model.signature import Signer

DEFAULT_TARGET = "rtx3090"


def _default_target(builder: str, compatibility: str) -> str:
    """Default target: the paper's GPU for TensorRT-RTX, the GPU of this machine for TensorRT."""
    if builder != "tensorrt":
        return PORTABLE_TARGET if compatibility == "ampere+" else DEFAULT_TARGET
    try:
        return find_gpu().target
    except EngineError as error:
        raise ConfigError(
            f"tensorrt needs the GPU that it builds for: {error.cause}",
            "use {}, which needs none",
            Setting("builder", "tensorrt-rtx"),
        ) from error


@dataclass(frozen=True, kw_only=True)
class ExportChoices:
    """Export settings as specified by a user; see `ExportOptions` and `BuildOptions`.

    Attributes:
        fp16: Whether to add an fp16 graph and an engine built from it.
        int8: Whether to add an int8 graph and an engine built from it.
        calibration: Folder of scans to calibrate the int8 ranges on.
        io: Type of the fp16 graph's input and output.
        builder: Library that builds the engines, or `none`.
        target: GPUs to build for, such as `rtx3090` or `sm89`.
        batch: Number of windows per call of an engine; None for
            `attnseg.runtime.engines.device.usual_batch` of the model's window.
        workspace_bytes: Largest scratch memory of a layer; None for no limit.
        compatibility: GPUs that an engine runs on: `same`, or `ampere+` for all since Ampere.
        version_compatible: Whether engines also run with later versions of TensorRT.
        timing_cache: TensorRT timing cache, read and updated.
        budget_dice: Largest drift of Dice; None for the default.
        budget_volume: Largest drift of a volume, in percent; None for the default.
        spec: JSON file that describes an ONNX file.
        sign: PEM file with the Ed25519 private key that signs the bundle.
        name: Name of the model; None for the one stored with it.
        description: Description of the model; None for the one stored with it.
        intended_use: Intended use of the model; None for the one stored with it.
        overwrite: Whether to replace a bundle that is there.
    """

    fp16: bool = False
    int8: bool = False
    calibration: Path | None = None
    io: Literal["fp16", "fp32"] = "fp16"
    builder: Builder | Literal["none"] = "tensorrt-rtx"
    target: tuple[str, ...] = ()
    batch: int | None = None
    workspace_bytes: int | None = None
    compatibility: Literal["same", "ampere+"] = "same"
    version_compatible: bool = False
    timing_cache: Path | None = None
    budget_dice: float | None = None
    budget_volume: float | None = None
    spec: Path | None = None
    sign: Path | None = None
    name: str | None = None
    description: str | None = None
    intended_use: str | None = None
    overwrite: bool = False

    def resolve(self) -> ExportOptions:
        """Resolve the settings to `ExportOptions`.

        Raises:
            ConfigError: A target is unknown, a budget is out of range, or settings contradict each
                other.
        """
        if self.int8 != (self.calibration is not None):
            raise ConfigError(
                "an int8 graph needs calibration scans, and only an int8 graph uses them",
                "give {} and {} together",
                Setting("int8", True),
                Setting("calibration", "FOLDER"),
            )
        words = {
            "name": self.name,
            "description": self.description,
            "intended_use": self.intended_use,
        }
        return ExportOptions(
            fp16=self.fp16,
            io=self.io,
            engines=self._engines(),
            budget=make_budget(self.budget_dice, self.budget_volume),
            words={key: text for key, text in words.items() if text},
            signer=Signer(self.sign) if self.sign else None,
            spec=self.spec,
            calibration=self.calibration,
            overwrite=self.overwrite,
        )

    def _targets(self) -> tuple[str, ...]:
        if self.target and self.builder == "none":
            raise ConfigError(
                "a target names a GPU to build for, and nothing is built",
                "leave {} or {} out",
                Setting("target"),
                Setting("builder", "none"),
            )
        if self.target or self.builder == "none":
            return self.target
        wanted = self.fp16 or self.int8 or self.compatibility != "same"
        if wanted or self.builder == "tensorrt":
            return (_default_target(self.builder, self.compatibility),)
        return ()

    def _engines(self) -> tuple[BuildOptions, ...]:
        builder, targets = self.builder, self._targets()
        engines: list[BuildOptions] = []
        if builder != "none":
            names = dict.fromkeys(parse_target(target, builder) for target in targets)
            engines += [self._engine(builder, name) for name in names]
        for_engines = ("batch", "workspace_bytes", "version_compatible", "timing_cache")
        unused = [name for name in for_engines if getattr(self, name)]
        if unused and not engines:
            raise ConfigError(
                "an option is for engines, and none is built",
                "leave {} out, or add {} or {}",
                Setting(unused[0]),
                Setting("fp16", True),
                Setting("target", DEFAULT_TARGET),
            )
        for engine in engines:
            check_options(engine)
            check_machine(engine)
        return tuple(engines)

    def _engine(self, builder: Builder, target: str) -> BuildOptions:
        return BuildOptions(
            builder=builder,
            target=target,
            batch=self.batch,
            workspace_bytes=self.workspace_bytes,
            compatibility=self.compatibility,
            version_compatible=self.version_compatible,
            timing_cache=None if self.timing_cache is None else str(self.timing_cache),
        )
