"""Writes the annotated bytes of docs/protocol.md: python3 protocol_examples.py ../../../../docs/protocol.md

Codes every message by the rules that the document gives, and seals the worked connection with Python's
`cryptography`; shares no code with the crate. `tests/goldens.rs` holds the document against the crate. Each block
that begins with ```hex NAME or ```each NAME gets a new body; the text around it stays as it is.
"""

import hashlib
import hmac
import re
import struct
import sys

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

# What the examples are made of: a value is a list of (bytes, annotation).


def varint(n):
    out = bytearray()
    while n >= 0x80:
        out.append(n & 0x7F | 0x80)
        n >>= 7
    return bytes(out + bytes([n]))


def whole(name, n):
    return [(varint(n), f"{name}: {n}")]


def double(name, x):
    return [(struct.pack("<d", x), f"{name}: {x}")]


def text(name, s):
    return [(varint(len(s.encode())), f"{name}: {len(s.encode())} bytes"), (s.encode(), f'"{s}"')]


def raw(name, data):
    return [(data, name)]


def blob(name, data):
    return [(varint(len(data)), f"{name}: {len(data)} bytes"), (data, "")]


def variant(code, name):
    return [(varint(code), name)]


def some(value):
    return [(b"\x01", "some")] + value


def none(name):
    return [(b"\x00", f"{name}: none")]


def listed(name, items):
    return [(varint(len(items)), f"{name}: {len(items)}")] + sum(items, [])


def coded(value):
    return b"".join(part for part, _ in value)


def run_of(start, length):
    return bytes((start + at) % 256 for at in range(length))


RUN = raw("run", run_of(0x10, 16))
PAYLOAD_HASH = raw("hash: BLAKE3 of the payload", run_of(0x30, 32))
BASE_HASH = run_of(0x50, 32)
LAYOUT = raw("layout: its fingerprint", run_of(0x70, 32))
NEW_HASH = run_of(0x90, 32)
TASK = [(varint(1 << 32 | 7), "task: 1.7, that is 1 · 2^32 + 7")]
WORKER_KEY = Ed25519PrivateKey.from_private_bytes(run_of(0xA0, 32))
COORDINATOR_KEY = Ed25519PrivateKey.from_private_bytes(run_of(0xC0, 32))
WORKER_PUBLIC = WORKER_KEY.public_key().public_bytes_raw()
COORDINATOR_PUBLIC = COORDINATOR_KEY.public_key().public_bytes_raw()
WORKER = raw("worker: SHA-256 of its Ed25519 key, first half", hashlib.sha256(WORKER_PUBLIC).digest()[:16])


def histogram(name, pairs):
    return listed(name, [[(varint(b) + varint(n), f"bin {b}: {n} rows")] for b, n in pairs])


CLASSIFICATION = (
    variant(0, "Classification")
    + double("loss_sum", 12.5)
    + whole("count", 40)
    + whole("correct", 35)
    + listed("scores", [histogram("positives, bins", [(3, 2), (1023, 18)]) + histogram("negatives, bins", [(0, 20)])])
)
REGRESSION = (
    variant(1, "Regression")
    + double("loss_sum", 12.5)
    + whole("count", 40)
    + double("squared_error", 90.0)
    + double("target_sum", -8.0)
    + double("target_squares", 256.0)
)
MANIFEST = (
    RUN
    + WORKER
    + TASK
    + variant(0, "kind: Update")
    + raw("base: hash of the model it was made from", BASE_HASH)
    + LAYOUT
    + whole("groups", 1)
    + variant(0, "encoding: F32")
    + whole("bytes", 4000)
    + PAYLOAD_HASH
    + whole("examples", 160)
    + whole("steps", 5)
    + whole("weight", 160)
    + some(double("metrics.train_loss", 0.5))
    + double("metrics.seconds", 1.25)
    + some([(part, note.replace("Class", "metrics.evaluation: Class")) for part, note in CLASSIFICATION])
)
RECEIPT = RUN + WORKER + TASK + PAYLOAD_HASH + whole("round", 3) + raw("model_hash: of the new model", NEW_HASH)


def signed(what, value, context, key):
    data = coded(value)
    signature = key.sign(context + data)
    return (
        [(varint(len(data)), f"bytes: {len(data)}, a {what}")]
        + value
        + [(varint(64), "signature: 64 bytes"), (signature, "")]
    )


SIGNED_MANIFEST = signed("Manifest", MANIFEST, b"tributary manifest 1\0", WORKER_KEY)
SIGNED_RECEIPT = signed("Receipt", RECEIPT, b"tributary receipt 1\0", COORDINATOR_KEY)
LEARNING = (
    some(text("data.label", "late"))
    + some(variant(0, "data.task: Classification"))
    + listed("data.drop", [text("a column", "tailnum")])
    + listed("data.categorical", [text("a column", "dest")])
    + double("data.validation_fraction", 0.2)
    + variant(1, "model: Mlp")
    + listed("hidden", [whole("width", 64), whole("width", 32)])
    + variant(0, "train.mode: Federated")
    + whole("train.rounds", 30)
    + whole("train.local_epochs", 1)
    + variant(0, "train.batch_size: Rows")
    + whole("rows", 32)
    + double("train.learning_rate", 0.05)
    + double("train.momentum", 0.0)
    + whole("train.seed", 7)
    + variant(0, "strategy: FedAvg")
)
CONTENT_KEY = run_of(0x77, 32)
CONTENT_ID = run_of(0x66, 16)


def content(name, start, hash_, size):
    return (
        raw(f"{name}.id", run_of(start, 16))
        + raw(f"{name}.key", CONTENT_KEY)
        + raw(f"{name}.hash", hash_)
        + whole(f"{name}.bytes", size)
    )


JOIN = variant(0, "Join") + whole("instance", 1234567890)
UPLOAD = TASK + PAYLOAD_HASH + whole("from", 65536)
HELLO = listed("versions", [whole("version", 1)]) + variant(0, "role: Worker") + variant(0, "mode: Direct")
HELLO_REFUSED = listed("speaks", [whole("version", 1)]) + text("sentence", "speak version 1")
SENTENCE = "column \"dest\" is missing: add it"

EXAMPLES = {
    "Hello": HELLO,
    "HelloRefused": HELLO_REFUSED,
    "EnrolRequest": raw("token", run_of(0xE0, 16)) + text("name", "shard") + raw("ed25519", WORKER_PUBLIC),
    "EnrolAnswer::Granted": variant(0, "Granted")
    + text("name", "shard-2")
    + blob("certificate", bytes.fromhex("3082010a"))
    + whole("expires_unix_s", 1800000000),
    "EnrolAnswer::Refused": variant(1, "Refused") + variant(1, "Expired"),
    "Manifest": MANIFEST,
    "Receipt": RECEIPT,
    "Signed": SIGNED_RECEIPT,
    "FromWorker::Join": JOIN,
    "FromWorker::Ready": variant(1, "Ready"),
    "FromWorker::Offer": variant(2, "Offer") + SIGNED_MANIFEST,
    "FromWorker::Failed": variant(3, "Failed")
    + TASK
    + variant(1, "NormTooLong")
    + double("got", 300.0)
    + double("max", 256.0),
    "FromWorker::Beat": variant(4, "Beat") + TASK + whole("steps", 1000),
    "FromWorker::Leaving": variant(5, "Leaving") + variant(1, "NotAllowed") + text("sentence", "rows are not shared"),
    "ToWorker::Welcome": variant(0, "Welcome")
    + whole("version", 1)
    + RUN
    + raw("ed25519: the coordinator's key", COORDINATOR_PUBLIC)
    + text("name", "shard-2")
    + whole("weight_max", 1 << 20)
    + double("norm_max", 256.0)
    + [(part, f"learning.{note}" if ":" in note and "." in note else note) for part, note in LEARNING],
    "ToWorker::Assigned": variant(1, "Assigned")
    + TASK
    + whole("round", 3)
    + variant(0, "kind: Update")
    + some(content("schema", 0x20, run_of(0x88, 32), 512))
    + some(content("model", 0x66, BASE_HASH, 4000))
    + LAYOUT
    + whole("weight_shift", 0),
    "ToWorker::Go": variant(2, "Go") + TASK + PAYLOAD_HASH + whole("from", 65536),
    "ToWorker::Held": variant(3, "Held") + TASK + PAYLOAD_HASH,
    "ToWorker::AlreadyHeld": variant(4, "AlreadyHeld") + TASK + PAYLOAD_HASH,
    "ToWorker::Late": variant(5, "Late") + TASK,
    "ToWorker::Refused": variant(6, "Refused") + TASK + variant(6, "WrongLength") + whole("got", 4000)
    + whole("expected", 4100),
    "ToWorker::Receipt": variant(7, "Receipt") + SIGNED_RECEIPT,
    "ToWorker::Displaced": variant(8, "Displaced"),
    "ToWorker::Rejected": variant(9, "Rejected") + text("sentence", SENTENCE),
    "ToWorker::GoingAway": variant(10, "GoingAway"),
    "ToWorker::Finished": variant(11, "Finished") + raw("model_hash", NEW_HASH),
    "ToWorker::Aborted": variant(12, "Aborted"),
    "Upload": UPLOAD,
    "Download": raw("id", CONTENT_ID),
}

# Enums inside of messages: every variant on a line of its own, in the order of their codes.


def each(*variants):
    return [
        (varint(code) + coded(fields), " ".join([name] + [note for _, note in fields]))
        for code, (name, fields) in enumerate(variants)
    ]


def plain(names):
    return each(*((name, []) for name in names.split()))


EACH = {
    "Role": plain("Worker Join"),
    "SessionMode": plain("Direct"),
    "TaskKind": plain("Update Gradient Rows Survey Evaluation Partial"),
    "Encoding": plain("F32 Ring64"),
    "EnrolRefusal": plain("Unknown Expired Spent LoopbackOnly Revoked Full BadKey"),
    "Refusal": each(
        *((name, []) for name in "WrongRun WrongWorker WrongSignature WrongKind WrongBase WrongLayout".split()),
        ("WrongLength", whole("got", 4000) + whole("expected", 4100)),
        *((name, []) for name in "WrongHash WrongEncoding NotFinite".split()),
        ("NormTooLong", double("got", 300.0) + double("max", 256.0)),
        ("WrongWeight", whole("got", 0) + whole("max", 160)),
        *((name, []) for name in "TooMany WrongMetrics Unreadable".split()),
    ),
    "Failure": each(("NotFinite", []), ("NormTooLong", double("got", 300.0) + double("max", 256.0))),
    "Leave": each(("Stopping", []), ("NotAllowed", text("sentence", "no")), ("DataUnfit", text("sentence", "empty"))),
    "Evaluation": [(coded(CLASSIFICATION), "Classification"), (coded(REGRESSION), "Regression")],
    "LearningTask": plain("Classification Regression"),
    "ModelSpec": each(("Linear", []), ("Mlp", listed("hidden", [whole("width", 64)]))),
    "Mode": plain("Federated Gradient Central"),
    "BatchSize": each(("Rows", whole("rows", 32)), ("Full", [])),
    "Strategy": plain("FedAvg"),
}

# The worked connection: frames, handshake, records.

FRAMES = {"Hello": 1, "Refused": 2, "Handshake": 3, "StreamOpen": 4}


def frame(kind, body):
    length = len(coded(body))
    return [(bytes([FRAMES[kind]]), f"kind: {kind}"), (struct.pack("<I", length), f"length: {length}")] + body


class Noise:
    """Noise_IK_25519_AESGCM_SHA256, section 5 of the specification."""

    def __init__(self, prologue, responder_public):
        self.hash = self.chain = b"Noise_IK_25519_AESGCM_SHA256".ljust(32, b"\0")
        self.mix_hash(prologue)
        self.mix_hash(responder_public)

    def mix_hash(self, data):
        self.hash = hashlib.sha256(self.hash + data).digest()

    def expand_two(self, secret):
        temporary = hmac.digest(self.chain, secret, "sha256")
        first = hmac.digest(temporary, b"\x01", "sha256")
        return first, hmac.digest(temporary, first + b"\x02", "sha256")

    def mix_key(self, private, public):
        shared = private.exchange(X25519PublicKey.from_public_bytes(public))
        self.chain, self.key = self.expand_two(shared)
        self.count = 0

    def seal(self, plaintext):
        sealed = AESGCM(self.key).encrypt(bytes(4) + struct.pack(">Q", self.count), plaintext, self.hash)
        self.count += 1
        self.mix_hash(sealed)
        return sealed


def public(private):
    return private.public_key().public_bytes_raw()


def expand(secret, info):
    return hmac.digest(secret, info + b"\x01", "sha256")


KINDS = {1: "control", 2: "payload", 3: "broadcast"}


def record(key, kind, flags, sequence, plaintext, content_id=b""):
    header = struct.pack("<BBBBIQ", 1, kind, flags, 0, len(plaintext), sequence) + content_id
    sealed = AESGCM(key).encrypt(bytes(4) + struct.pack(">Q", sequence), plaintext, header)
    parts = [
        (header[:1], "version: 1"),
        (header[1:2], f"kind: {kind}, {KINDS[kind]}"),
        (header[2:3], f"flags: {'FINAL' if flags else 'none'}"),
        (header[3:4], "reserved"),
        (header[4:8], f"length: {len(plaintext)}"),
        (header[8:16], f"sequence: {sequence}"),
    ]
    parts += [(content_id, "content id")] if content_id else []
    return parts + [(sealed[:-16], "ciphertext"), (sealed[-16:], "tag")]


def connection():
    worker, coordinator, worker_once, coordinator_once = (
        X25519PrivateKey.from_private_bytes(run_of(start, 32)) for start in (0x01, 0x21, 0x41, 0x61)
    )
    hello, exporter = frame("Hello", HELLO), run_of(0x81, 32)
    length = len(coded(hello))
    prologue = raw('"tributary session 1"', b"tributary session 1") + raw(
        f"length of the Hello frame: {length}", struct.pack("<I", length)
    )
    prologue += raw("the Hello frame", coded(hello)) + raw("TLS exporter", exporter)
    noise = Noise(coded(prologue), public(coordinator))
    noise.mix_hash(public(worker_once))
    first = raw("e: the worker's ephemeral key", public(worker_once))
    noise.mix_key(worker_once, public(coordinator))
    first += raw("s: the worker's static key, sealed", noise.seal(public(worker)))
    noise.mix_key(worker, public(coordinator))
    first += raw("payload, empty, sealed: the tag alone", noise.seal(b""))
    noise.mix_hash(public(coordinator_once))
    second = raw("e: the coordinator's ephemeral key", public(coordinator_once))
    noise.mix_key(coordinator_once, public(worker_once))
    noise.mix_key(coordinator_once, public(worker))
    second += raw("payload, empty, sealed: the tag alone", noise.seal(b""))
    from_worker, to_worker = noise.expand_two(b"")

    def stream_key(secret, number):
        return expand(secret, b"tributary stream 1" + struct.pack("<I", number) + noise.hash)

    return {
        "hello frame": hello,
        "refused frame": frame("Refused", HELLO_REFUSED),
        "prologue": prologue,
        "first handshake frame": frame("Handshake", first),
        "second handshake frame": frame("Handshake", second),
        "handshake hash": raw("h", noise.hash),
        "control record": record(stream_key(from_worker, 0), 1, 0, 0, coded(JOIN)),
        "answer record": record(stream_key(to_worker, 0), 1, 0, 0, coded(EXAMPLES["ToWorker::GoingAway"])),
        "stream frame": frame("StreamOpen", [(struct.pack("<I", 1), "number: 1")]),
        "payload record": record(stream_key(from_worker, 1), 2, 0, 0, coded(UPLOAD)),
        "broadcast record": record(CONTENT_KEY, 3, 1, 0, b"model", CONTENT_ID),
    }


def lines(parts, width):
    for data, note in parts:
        for at in range(0, len(data), width):
            hexed = data[at : at + width].hex(" ")
            yield f"{hexed:<{3 * width}}# {note}".rstrip(" #") if at == 0 and note else hexed


def main(path):
    blocks = {f"hex {name}": "\n".join(lines(parts, 16)) for name, parts in (EXAMPLES | connection()).items()}
    for name, parts in EACH.items():
        width = min(max(len(data) for data, _ in parts), 48)
        blocks[f"each {name}"] = "\n".join(f"{data.hex(' '):<{3 * width}}# {note}" for data, note in parts)
    with open(path, encoding="utf-8") as file:
        document = file.read()
    for name, body in blocks.items():
        pattern = re.compile(f"^(```{re.escape(name)}\n).*?^```$", re.MULTILINE | re.DOTALL)
        document, found = pattern.subn(lambda match: f"{match[1]}{body}\n```", document)
        if found != 1:
            sys.exit(f"{path}: block ```{name} is there {found} times, expected once")
    with open(path, "w", encoding="utf-8") as file:
        file.write(document)


main(sys.argv[1])
