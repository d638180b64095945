"""Postprocessing of a MONAI bundle: the transforms after the network."""

from __future__ import annotations

import ast
from dataclasses import dataclass

from attnseg.imports.monai.config import Component, Config, is_number
from attnseg.imports.monai.preprocessing import Before, keep_type
from attnseg.runtime.errors import ExportError
from attnseg.runtime.steps.resample import Quantity
from attnseg.runtime.task import Activation

_LARGEST = 1 << 16  # channel or label of a lambda


@dataclass
class After:
    """What the transforms after the network do.

    Attributes:
        activation: Function from logits to probabilities; None if none is applied.
        inverted: Whether the outputs were returned to the scan's grid.
        back: Quantity that was returned.
        threshold: Probability above which a channel is written; None for argmax.
        decided: Whether a label or a channel was decided.
        written: Channel and label of each region in the order of writing; empty for one channel.
    """

    activation: Activation | None = None
    inverted: bool = False
    back: Quantity = "logits"
    threshold: float | None = None
    decided: bool = False
    written: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, config: Config, before: Before) -> After:
        """Read the section `postprocessing`."""
        found, keys = cls(), set[str]()
        for step in config.transforms("postprocessing"):
            keys.add(step.key())
            if len(keys) > 1:
                step.refuse(f"changes another key than {min(keys)}")
            found._take(step, before)
            step.done()
        if not found.decided:
            raise ExportError(f"{config.path}: postprocessing has no AsDiscreted")
        if before.spacing_mm and not found.inverted:
            raise ExportError(
                f"{config.path}: postprocessing has no Invertd, so labels stay on the grid of "
                "Spacingd",
                "add Invertd before AsDiscreted",
            )
        return found

    def _take(self, step: Component, before: Before) -> None:
        match step.name:
            case "EnsureTyped" | "ToTensord":
                keep_type(step)
            case "Activationsd":
                self._activate(step)
            case "Invertd":
                self._invert(step, before)
            case "AsDiscreted":
                self._decide(step)
            case "Lambdad":
                self._write(step)
            case "SaveImaged":
                _save(step)
            case _:
                step.refuse("is a transform that is not supported")

    def _activate(self, step: Component) -> None:
        if self.activation or self.decided:
            step.refuse("comes after an activation or AsDiscreted")
        kinds = [name for name in ("softmax", "sigmoid") if step.flag(name, False)]
        if len(kinds) != 1:
            step.refuse("needs either softmax or sigmoid")
        step.expect("other", None)
        self.activation = "softmax" if kinds == ["softmax"] else "sigmoid"

    def _invert(self, step: Component, before: Before) -> None:
        reference = str(step.raw("transform")).removeprefix("$").strip()
        if reference != "@preprocessing":
            step.refuse(f"has transform {reference}, not @preprocessing")
        step.expect("orig_keys", before.image)
        step.expect("post_func", None)
        nearest = step.flag("nearest_interp", True)
        step.ignore("meta_keys", "orig_meta_keys", "meta_key_postfix", "to_tensor", "device")
        if before.spacing_mm and (nearest or self.decided):
            step.refuse("resamples labels", "set nearest_interp to false, before AsDiscreted")
        self.inverted = True
        self.back = "probabilities" if self.activation else "logits"

    def _decide(self, step: Component) -> None:
        if self.decided:
            step.refuse("is the second AsDiscreted")
        argmax = step.flag("argmax", False)
        threshold = step.take("threshold")
        if argmax == (threshold is not None):
            step.refuse("needs either argmax or threshold")
        if (self.activation == "sigmoid") == argmax:
            step.refuse("needs argmax after softmax or no activation, or threshold after sigmoid")
        if not argmax and not (is_number(threshold) and 0 < threshold < 1):
            step.refuse(f"has threshold {threshold!r}, not a number within 0 and 1")
        step.expect("to_onehot", None)
        step.expect("rounding", None)
        self.threshold = None if argmax else float(threshold)
        self.decided = True

    def _write(self, step: Component) -> None:
        if self.threshold is None or self.written:
            step.refuse("is supported once, after AsDiscreted with a threshold")
        step.expect("overwrite", True)
        text = str(step.raw("func"))
        written = _written(text)
        if written is None:
            step.refuse(
                f"has func {text[:160]}, which is Python that is not recognised",
                "write nested torch.where(x[[CHANNEL]] > 0, LABEL, OTHERWISE), the last 0",
            )
        self.written = written


def _save(step: Component) -> None:
    step.expect("scale", None)
    step.expect("channel_dim", 0)
    step.ignore("output_dir", "output_postfix", "output_ext", "output_dtype", "resample", "mode")
    step.ignore("padding_mode", "dtype", "squeeze_end_dims", "data_root_dir", "separate_folder")
    step.ignore("print_log", "output_format", "meta_keys", "meta_key_postfix", "writer")
    step.ignore("output_name_formatter", "folder_layout", "savepath_in_metadict")


def _written(text: str) -> tuple[tuple[int, int], ...] | None:
    """Channel and label of each `where` of a lambda, the innermost first; None if it differs."""
    try:
        tree = ast.parse(text.removeprefix("$").strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    if not isinstance(tree, ast.Lambda) or len(tree.args.args) != 1:
        return None
    image, node, found = tree.args.args[0].arg, tree.body, list[tuple[int, int]]()
    while not (isinstance(node, ast.Constant) and node.value == 0):
        match node:
            case ast.Call(
                func=ast.Attribute(value=ast.Name(id="torch" | "np" | "numpy"), attr="where"),
                args=[
                    ast.Compare(
                        left=ast.Subscript(
                            value=ast.Name(id=name),
                            slice=ast.List(elts=[ast.Constant(value=int(channel))]),
                        ),
                        ops=[ast.Gt()],
                        comparators=[ast.Constant(value=0)],
                    ),
                    ast.Constant(value=int(label)),
                    otherwise,
                ],
                keywords=[],
            ) if name == image and max(channel, label) <= _LARGEST:
                found.append((channel, label))
                node = otherwise
            case _:
                return None
    return tuple(reversed(found)) or None
