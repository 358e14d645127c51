"""How a file shows that it is what was written: with a SHA-256 in its first key, or in its first line."""

import hashlib

CHECKSUM_KEY = b'{"sha256": "'


class Damaged(Exception):
    """A file whose content is not what was written."""


def with_checksum(mapping: bytes) -> bytes:
    """A JSON mapping with a first key added: the checksum of everything that follows it."""
    rest = mapping[1:]
    return CHECKSUM_KEY + _digest(rest).encode() + b'", ' + rest


def checked(mapping: bytes) -> bytes:
    """The JSON mapping without its checksum.

    Raises:
        Damaged: it is not what was written.
    """
    digest, rest = mapping[len(CHECKSUM_KEY) :][:64], mapping[len(CHECKSUM_KEY) + 64 + 3 :]
    if not mapping.startswith(CHECKSUM_KEY) or _digest(rest).encode() != digest:
        raise Damaged("checksum")
    return b"{" + rest


def state_header(epoch: int, state: bytes) -> bytes:
    """The line before a model or checkpoint: the checksum of what follows, and the epoch after which it was taken."""
    return f"{_digest(b'%d ' % epoch + state)} {epoch}\n".encode()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
