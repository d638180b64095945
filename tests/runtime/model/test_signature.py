from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from attnseg import Bundle
from attnseg.runtime.errors import BundleError, ConfigError, DependencyError
from attnseg.runtime.model.bundle import file_entry
from attnseg.runtime.model.signature import Signer, check_signature
from tests.bundles import small_graph, write_bundle

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl command")


def write_keys(folder: Path, name: str = "key") -> tuple[Path, Path]:
    """An Ed25519 key pair as PEM files, private and public."""
    from cryptography.hazmat.primitives import serialization as s
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.generate()
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    plain = s.NoEncryption()
    private.write_bytes(key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, plain))
    form = s.PublicFormat.SubjectPublicKeyInfo
    public.write_bytes(key.public_key().public_bytes(s.Encoding.PEM, form))
    return private, public


def signed_bundle(folder: Path, private: Path | None) -> Bundle:
    entries = {"model.onnx": file_entry("onnx", small_graph(), "fp32")}
    manifest = replace(Bundle.default().manifest, files=entries)
    sign = Signer(private).sign if private else None
    return write_bundle(folder / "bundle", manifest, {"model.onnx": small_graph()}, sign)


def test_a_bundle_signed_by_the_key_passes(tmp_path: Path) -> None:
    private, public = write_keys(tmp_path)
    check_signature(signed_bundle(tmp_path, private), public)


@needs_openssl
def test_openssl_agrees(tmp_path: Path) -> None:
    private, public = write_keys(tmp_path)
    folder = signed_bundle(tmp_path, private).folder
    common = ["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", str(public), "-rawin"]
    files = ["-in", "manifest.json", "-sigfile", "manifest.json.sig"]
    done = subprocess.run([*common, *files], cwd=folder, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_bundle_without_signature_is_refused(tmp_path: Path) -> None:
    _, public = write_keys(tmp_path)
    with pytest.raises(BundleError, match="is not signed; export it with sign="):
        check_signature(signed_bundle(tmp_path, None), public)


def test_the_signature_of_another_key_is_refused(tmp_path: Path) -> None:
    private, _ = write_keys(tmp_path)
    _, other = write_keys(tmp_path, "other")
    with pytest.raises(BundleError, match=r"is not a signature of this bundle by the key .*other"):
        check_signature(signed_bundle(tmp_path, private), other)


def test_a_manifest_that_is_exchanged_after_loading_is_refused(tmp_path: Path) -> None:
    """The other manifest is signed too, as that of an earlier version is."""
    private, public = write_keys(tmp_path)
    folder = signed_bundle(tmp_path, private).folder
    stored = [(folder / name).read_bytes() for name in ("manifest.json", "manifest.json.sig")]
    changed = stored[0] + b" "
    (folder / "manifest.json").write_bytes(changed)
    (folder / "manifest.json.sig").write_bytes(Signer(private).sign(changed))
    bundle = Bundle.load(folder)
    check_signature(bundle, public)
    for name, content in zip(("manifest.json", "manifest.json.sig"), stored, strict=True):
        (folder / name).write_bytes(content)
    with pytest.raises(BundleError, match=r"manifest\.json: was changed while the bundle was in"):
        check_signature(bundle, public)


def test_a_signature_is_at_most_64_bytes_of_a_regular_file(tmp_path: Path) -> None:
    private, public = write_keys(tmp_path)
    bundle = signed_bundle(tmp_path, private)
    signature = bundle.folder / "manifest.json.sig"
    signature.write_bytes(signature.read_bytes() + b"x")
    with pytest.raises(BundleError, match=r"json\.sig: has 65 bytes, more than 64"):
        check_signature(bundle, public)
    signature.unlink()
    signature.symlink_to("/dev/zero")
    with pytest.raises(BundleError, match="is not signed"):
        check_signature(bundle, public)


@pytest.mark.parametrize("name", ["manifest.json", "manifest.json.sig"])
def test_what_was_changed_after_signing_is_refused(tmp_path: Path, name: str) -> None:
    private, public = write_keys(tmp_path)
    folder = signed_bundle(tmp_path, private).folder
    content = bytearray((folder / name).read_bytes())
    content[-1] ^= 0x2A  # the newline at the end of the manifest becomes a space
    (folder / name).write_bytes(content)
    with pytest.raises(BundleError, match="is not a signature of this bundle"):
        check_signature(Bundle.load(folder), public)


def test_files_that_are_no_keys_are_refused(tmp_path: Path) -> None:
    private, public = write_keys(tmp_path)
    junk = tmp_path / "junk"
    junk.write_bytes(b"junk")
    for file in (junk, public):
        with pytest.raises(ConfigError, match="holds no Ed25519 private key"):
            Signer(file)
    bundle = signed_bundle(tmp_path, private)
    for file in (junk, private):
        with pytest.raises(ConfigError, match="holds no Ed25519 public key"):
            check_signature(bundle, file)
    with pytest.raises(ConfigError, match=r"gone: cannot be read .*; give a key file"):
        check_signature(bundle, tmp_path / "gone")
    with pytest.raises(ConfigError, match=r"cannot be read \(embedded null byte\)"):
        check_signature(bundle, tmp_path / "a\0b")


def test_without_cryptography_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    private, public = write_keys(tmp_path)
    bundle = signed_bundle(tmp_path, private)
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives", None)
    for use in (lambda: Signer(private), lambda: check_signature(bundle, public)):
        with pytest.raises(DependencyError, match=r"pip install '\.\[sign\]'"):
            use()
