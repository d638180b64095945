"""Bundles that tests make of a manifest and the content of its files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from attnseg import Bundle
from attnseg.runtime.model.bundle import draft_bundle
from attnseg.runtime.model.manifest import Manifest


def write_bundle(
    folder: Path,
    manifest: Manifest,
    files: Mapping[str, bytes],
    sign: Callable[[bytes], bytes] | None = None,
) -> Bundle:
    """Write a bundle atomically, and load it.

    Args:
        folder: Folder of the bundle; must be absent or empty.
        manifest: Manifest with exactly one entry for each of `files`.
        files: Content by file name.
        sign: Function that returns the signature of the manifest's bytes; None for no signature.

    Raises:
        BundleError: The folder is not empty, or cannot be written.
    """
    with draft_bundle(folder, manifest) as draft:
        for name, content in files.items():
            draft.add(name, content, manifest.files[name])
        draft.commit(sign)
    return Bundle.load(folder)
