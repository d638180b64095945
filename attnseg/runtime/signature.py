r"""Who made a bundle: a detached Ed25519 signature (RFC 8032) of its manifest.

The manifest holds the checksum of every file, so its signature is one of the whole bundle. The
signature is the 64 bytes of `manifest.json.sig`; openssl makes and checks the same:

    openssl genpkey -algorithm ed25519 -out key.pem
    openssl pkey -in key.pem -pubout -out key.pub
    openssl pkeyutl -verify -pubin -inkey key.pub -rawin \
        -in manifest.json -sigfile manifest.json.sig
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from attnseg.runtime.bundle import MANIFEST, SIGNATURE, Bundle
from attnseg.runtime.errors import BundleError, ConfigError


def _cryptography() -> Any:
    try:
        from cryptography.hazmat.primitives import serialization
    except ImportError as error:
        raise ConfigError("signatures need cryptography; pip install 'attnseg[sign]'") from error
    return serialization


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror}); give a key file") from error


class Signer:
    """Signs manifests with a private key."""

    def __init__(self, key: Path) -> None:
        """Read the key.

        Args:
            key: PEM file with an Ed25519 private key, without passphrase.

        Raises:
            ConfigError: it is none, or `cryptography` is not installed.
        """
        serialization, stored = _cryptography(), _read(key)
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        try:
            private = serialization.load_pem_private_key(stored, password=None)
        except (ValueError, TypeError) as error:
            private = error
        if not isinstance(private, Ed25519PrivateKey):
            raise ConfigError(
                f"{key}: holds no Ed25519 private key without passphrase; make one with "
                "openssl genpkey -algorithm ed25519"
            )
        self._key = private

    def sign(self, manifest: bytes) -> bytes:
        """The 64 bytes that sign a manifest."""
        return bytes(self._key.sign(manifest))


def check_signature(bundle: Bundle, key: Path) -> None:
    """Refuse a bundle that the owner of a key has not signed.

    Args:
        bundle: whose files were found to match its manifest.
        key: PEM file with the Ed25519 public key.

    Raises:
        BundleError: the bundle has no signature, or it is not of this key or this manifest.
        ConfigError: the file holds no public key, or `cryptography` is not installed.
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
            f"{key}: holds no Ed25519 public key; make it with openssl pkey -in key.pem -pubout"
        )
    file = bundle.folder / SIGNATURE
    if not file.is_file():
        raise BundleError(
            f"{bundle.folder}: is not signed; export it with --sign, or leave --require-signature "
            "out"
        )
    try:
        public.verify(file.read_bytes(), (bundle.folder / MANIFEST).read_bytes())
    except InvalidSignature as error:
        raise BundleError(
            f"{file}: is not a signature of this bundle by the key {key}; do not use the bundle, "
            "get it again from who made it"
        ) from error
