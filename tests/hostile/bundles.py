"""Hostile bundles: their manifest, their files, and what stands in the place of a file."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator

from attnseg import Bundle
from attnseg.runtime.model.golden import read_golden
from attnseg.runtime.model.manifest import MANIFEST, Manifest
from attnseg.runtime.model.manifest_format import decode_manifest, encode_manifest
from attnseg.runtime.model.verdict import over_budget, read_verdicts
from attnseg.runtime.steps.preprocess import Preprocessing
from attnseg.runtime.steps.resample import Grid
from attnseg.runtime.steps.schemes import ClipZScore, Range, SingleZScore, Unchanged
from attnseg.runtime.task import Output
from tests.hostile.drive import SilentlyWrongError
from tests.hostile.model import open_tiny, scan, tiny_bundle
from tests.hostile.mutate import any_value, change_bytes, change_json, encode_json, pick


class Bundles:
    """A bundle whose manifest or files were changed; an accepted one segments a scan."""

    def __init__(self, seeds: Path) -> None:
        self.folder = tiny_bundle(seeds / "bundle").folder
        self.manifest: dict[str, Any] = json.loads((self.folder / MANIFEST).read_bytes())
        self.volume = scan()

    def make(self, rng: Generator, folder: Path) -> None:
        """See `Reader.make`."""
        bundle = Path(shutil.copytree(self.folder, folder / "bundle"))
        how: Callable[[Generator, Path], None] = pick(
            rng, (self._manifest, self._manifest, self._manifest, self._file, self._place, _graph)
        )
        how(rng, bundle)

    def _manifest(self, rng: Generator, bundle: Path) -> None:
        changed = change_json(rng, self.manifest, 2)
        if rng.random() < 0.1:
            changed["format_version"] = pick(rng, (1, 2, 4, 3.0, True, "3", any_value(rng)))
        (bundle / MANIFEST).write_bytes(encode_json(rng, changed))

    def _file(self, rng: Generator, bundle: Path) -> None:
        """Change a file against the manifest, or exchange two files."""
        names = list(self.manifest["files"])
        first, second = bundle / pick(rng, names), bundle / pick(rng, names)
        if rng.random() < 0.8:
            first.write_bytes(change_bytes(rng, first.read_bytes()))
        else:
            content = first.read_bytes(), second.read_bytes()
            first.write_bytes(content[1])
            second.write_bytes(content[0])

    def _place(self, rng: Generator, bundle: Path) -> None:
        """Put something else in the place of a file."""
        file = bundle / pick(rng, [*self.manifest["files"], MANIFEST])
        content = file.read_bytes()
        file.unlink()
        how = int(rng.integers(6))
        if how == 0:
            os.mkfifo(file)
        elif how == 1:
            file.mkdir()
        elif how == 2:
            file.symlink_to("/dev/zero")
        elif how == 3:
            file.symlink_to(pick(rng, ("gone", file.name, "/etc/hostname", "/proc/self/mem")))
        elif how == 4:
            (bundle.parent / "elsewhere").write_bytes(content)
            file.symlink_to(bundle.parent / "elsewhere")

    def read(self, folder: Path) -> None:
        """See `Reader.read`."""
        bundle = Bundle.load(folder / "bundle")
        for name, entry in bundle.manifest.files.items():
            content = (bundle.folder / name).read_bytes()
            if (len(content), hashlib.sha256(content).hexdigest()) != (
                entry.size_bytes,
                entry.sha256,
            ):
                raise SilentlyWrongError(f"{name} does not match the manifest")
        check_manifest(bundle.manifest)
        over_budget(bundle, "onnxruntime")
        result = open_tiny(bundle).segment(self.volume)
        values = set(np.unique(result.labels).tolist())
        if not values <= set(bundle.manifest.task.label_values):
            raise SilentlyWrongError(f"labels {values} are none of the manifest's")
        if result.labels.shape != self.volume.shape:
            raise SilentlyWrongError(f"labels of shape {result.labels.shape}")


def check_manifest(manifest: Manifest) -> None:
    """Check that an accepted manifest is written and read back as it is."""
    again = decode_manifest(encode_manifest(manifest))
    pairs = [
        (repr(getattr(manifest, field.name)), repr(getattr(again, field.name)))
        for field in fields(manifest)
    ]
    if changed := [pair for pair in pairs if pair[0] != pair[1]]:
        raise SilentlyWrongError(f"fields change when they are stored: {changed}")


def match_manifest(bundle: Path) -> None:
    """Set the checksums of the manifest to those of the files, as whoever makes a bundle can."""
    manifest = json.loads((bundle / MANIFEST).read_bytes())
    for name, entry in manifest["files"].items():
        content = (bundle / name).read_bytes()
        entry |= {"sha256": hashlib.sha256(content).hexdigest(), "size_bytes": len(content)}
    (bundle / MANIFEST).write_text(json.dumps(manifest))


def _graph(rng: Generator, bundle: Path) -> None:
    """Change the graph, and the manifest to match."""
    file = bundle / "model.onnx"
    file.write_bytes(change_bytes(rng, file.read_bytes()))
    match_manifest(bundle)


def _of_all_kinds(shipped: Bundle) -> list[Manifest]:
    """The shipped manifest, and one with a scheme of every kind and one output per region."""
    manifest = shipped.manifest
    regions = replace(
        manifest.task,
        activation="sigmoid",
        outputs=(Output("WT", 2, (0,)), Output("TC", 1, (1,)), Output("ET", 4, (2,))),
    )
    schemes = (SingleZScore("filled"), ClipZScore(-9, 9, 1, 2), Range((0, 255)), Unchanged())
    preprocessing = Preprocessing(
        orientation=None,
        grid=Grid(spacing_mm=(3.0, 1.0, 1.0), order=3, separate_above=3.0),
        crop="nonzero",
        normalisation=schemes,
        order=("crop", "normalise", "resample"),
        axes=(2, 1, 0),
    )
    inference = replace(manifest.inference, mirror_axes=(0, 1), placement="even")
    other = replace(manifest, task=regions, preprocessing=preprocessing, inference=inference)
    return [manifest, other]


class Manifests:
    """The bytes of a manifest of version 2 or 3, which is read, written and read again."""

    def __init__(self, _: Path) -> None:
        shipped = Bundle.default()
        older = json.loads((shipped.folder / MANIFEST).read_bytes())
        self.manifests = [older, *map(json.loads, map(encode_manifest, _of_all_kinds(shipped)))]

    def make(self, rng: Generator, folder: Path) -> None:
        """See `Reader.make`."""
        changed = change_json(rng, pick(rng, self.manifests), 2)
        (folder / MANIFEST).write_bytes(encode_json(rng, changed))

    def read(self, folder: Path) -> None:
        """See `Reader.read`."""
        stored = (folder / MANIFEST).read_bytes()
        manifest = decode_manifest(stored)
        check_manifest(manifest)


class Reports:
    """Golden windows and parity reports that match the manifest of their bundle."""

    def __init__(self, seeds: Path) -> None:
        self.folder = tiny_bundle(seeds / "bundle").folder
        self.parity = json.loads((self.folder / "parity.json").read_bytes())

    def make(self, rng: Generator, folder: Path) -> None:
        """See `Reader.make`."""
        bundle = Path(shutil.copytree(self.folder, folder / "bundle"))
        golden, parity = bundle / "golden.npz", bundle / "parity.json"
        if rng.random() < 0.3:
            parity.write_bytes(encode_json(rng, change_json(rng, self.parity)))
        elif rng.random() < 0.5:
            golden.write_bytes(change_bytes(rng, golden.read_bytes()))
        else:
            golden.write_bytes(_archive(rng, golden.read_bytes()))
        match_manifest(bundle)

    def read(self, folder: Path) -> None:
        """See `Reader.read`."""
        bundle = Bundle.load(folder / "bundle")
        verdicts = read_verdicts(bundle)
        if not all(isinstance(str(verdict), str) for verdict in verdicts):
            raise SilentlyWrongError(f"verdicts {verdicts}")
        golden = read_golden(bundle)
        if golden.image.dtype != np.float32 or golden.logits.shape[:2] != (1, 4):
            raise SilentlyWrongError(f"{golden.image.dtype} {golden.logits.shape}")
        golden.difference(golden.logits)


def _npy(rng: Generator) -> bytes:
    """A NumPy file of any type and shape, or with a header that says so."""
    stream, how = io.BytesIO(), rng.random()
    if how < 0.6:
        shape = tuple(pick(rng, (0, 1, 2, 4, 8)) for _ in range(int(rng.integers(0, 7))))
        kind = pick(rng, ("f2", "f4", ">f4", "f8", "i4", "c8", "U3", "S2", "?", "M8[s]", "O"))
        np.save(stream, np.zeros(shape).astype(kind) if kind != "O" else np.array([{}], object))
        return stream.getvalue()
    shapes = ("(1, 4, 99999, 9, 9)", "(-1,)", "(1,) * 9", "1" * 400, "(2**62, 2**62)", "[1]")
    types = ("'<f4'", "'|O'", "'V9999999'", "[('a', '<f4')]", "'<f99'", "__import__('os')")
    text = f"{{'descr': {pick(rng, types)}, 'fortran_order': False, 'shape': {pick(rng, shapes)}}}"
    if rng.random() < 0.2:
        text = pick(rng, ("(" * 5000, "'" + "a" * 70_000, "\0", "{" * 300, "-" * 20_000 + "1"))
    start = b"\x93NUMPY" + bytes([pick(rng, (1, 2, 3, 9)), 0])
    size = len(text).to_bytes(4, "little")[: pick(rng, (2, 4))]
    return start + size + text.encode() + bytes(100)


def _archive(rng: Generator, golden: bytes) -> bytes:
    """An archive with other members, more of them, or damaged ones."""
    with zipfile.ZipFile(io.BytesIO(golden)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    for name in members:
        if rng.random() < 0.6:
            how = rng.random()
            members[name] = _npy(rng) if how < 0.7 else change_bytes(rng, members[name])
            if how > 0.97:
                members[name] += bytes(100 << 20)
    stream = io.BytesIO()
    kind = pick(rng, (zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED, zipfile.ZIP_BZIP2))
    with zipfile.ZipFile(stream, "w", kind) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    stored = stream.getvalue()
    return change_bytes(rng, stored) if rng.random() < 0.2 else stored
