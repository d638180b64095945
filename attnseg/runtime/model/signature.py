r"""Signature of a bundle: a detached Ed25519 signature (RFC 8032) of its manifest.

The manifest lists the checksum of every file, so its signature covers the whole bundle. It is
stored as 64 bytes in `manifest.json.sig`. The equivalent openssl commands are:

    openssl genpkey -algorithm ed25519 -out key.pem
    openssl pkey -in key.pem -pubout -out key.pub
    openssl pkeyutl -verify -pubin -inkey key.pub -rawin \
        -in manifest.json -sigfile manifest.json.sig
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from attnseg.runtime.errors import BundleError, ConfigError, DependencyError, Setting
from attnseg.runtime.extras import install
from attnseg.runtime.files import read_file
from attnseg.runtime.model.bundle import Bundle, read_bounded
from attnseg.runtime.model.manifest import SIGNATURE

_SIGNATURE_BYTES = 64


def _cryptography() -> Any:
    try:
        from cryptography.hazmat.primitives import serialization
    except ImportError as error:
        raise DependencyError("signatures need cryptography", install("sign")) from error
    return serialization


def _read(file: Path) -> bytes:
    try:
        return read_file(file)
    except OSError as error:
        raise ConfigError(
            f"{file}: cannot be read ({error.strerror})", "give a key file"
        ) from error


class Signer:
    """Signs manifests with an Ed25519 private key."""

    def __init__(self, key: Path) -> None:
        """Read the private key.

        Args:
            key: PEM file with an unencrypted Ed25519 private key.

        Raises:
            ConfigError: The file holds no such key, or `cryptography` is not installed.
        """
        serialization, stored = _cryptography(), _read(key)
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        try:
            private = serialization.load_pem_private_key(stored, password=None)
        except (ValueError, TypeError) as error:
            private = error
        if not isinstance(private, Ed25519PrivateKey):
            raise ConfigError(
                f"{key}: holds no Ed25519 private key without passphrase",
                "make one with openssl genpkey -algorithm ed25519",
            )
        self._key = private

    def sign(self, manifest: bytes) -> bytes:
        """Signature of the bytes of a manifest, 64 bytes."""
        return bytes(self._key.sign(manifest))


def check_signature(bundle: Bundle, key: Path) -> None:
    """Raise `BundleError` unless a bundle is signed with the private key of a public key.

    Args:
        bundle: Bundle with verified checksums.
        key: PEM file with the Ed25519 public key.

    Raises:
        BundleError: The signature is missing, or does not match the key or the manifest, or the
            manifest was changed since the bundle was loaded.
        ConfigError: The file holds no public key, or `cryptography` is not installed.
    """
    serialization, stored = _cryptography(), _read(key)
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        public = serialization.load_pem_public_key(stored)
    except ValueError as error:
        public = error
    if not isinstance(public, Ed25519PublicKey):
        raise ConfigError(
            f"{key}: holds no Ed25519 public key", "make it with openssl pkey -in key.pem -pubout"
        )
    file = bundle.folder / SIGNATURE
    if not file.is_file():
        raise BundleError(
            f"{bundle.folder}: is not signed",
            "export it with {}, or do not require a signature",
            Setting("sign", "KEY.pem"),
        )
    try:
        public.verify(read_bounded(file, _SIGNATURE_BYTES), bundle.read_manifest())
    except InvalidSignature as error:
        raise BundleError(
            f"{file}: is not a signature of this bundle by the key {key}",
            "do not use the bundle; obtain it again from its publisher",
        ) from error
