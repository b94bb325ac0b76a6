"""Prints the golden bytes of the session's key schedule and records.

Needs Python's `cryptography`; shares no code with the crate. Run it by hand: python3 session_golden.py
"""

import hashlib
import hmac
import struct

from cryptography.hazmat.primitives.ciphers.aead import AESGCM


def expand(secret, info):
    return hmac.new(secret, info + b"\x01", hashlib.sha256).digest()


def record(key, kind, flags, sequence, plaintext, content_id=b""):
    header = struct.pack("<BBBBIQ", 1, kind, flags, 0, len(plaintext), sequence) + content_id
    nonce = bytes(4) + struct.pack(">Q", sequence)
    return header + AESGCM(key).encrypt(nonce, plaintext, header)


handshake_hash = b"h" * 32
key = expand(b"\x01" * 32, b"tributary stream 1" + struct.pack("<I", 1) + handshake_hash)
print("payload, first:", record(key, 2, 0, 0, b"first").hex())
print("payload, last: ", record(key, 2, 1, 1, b"second and last").hex())
print("broadcast:     ", record(b"\x0c" * 32, 3, 1, 0, b"model", bytes(range(16))).hex())
