"""Flower in its fastest arrangement, for the programs beside this one.

That is the legacy pair `start_server` and `start_client`: one gRPC stream a client that stays open for the whole run,
here under TLS (the server's certificate is checked, the clients have none, as Flower has it). The deployment mode,
which Flower recommends in its place, polls, and takes seconds a round.

The server stays in this process. Clients live in child processes, a thread each, that run the same program with
`--clients COUNT ADDRESS` and end when their standard input does, so with their parent in whatever way it ends.
"""

import datetime
import ipaddress
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time

os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
os.environ["GRPC_VERBOSITY"] = "ERROR"

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.compat.client.app import start_client
from flwr.compat.server.app import start_server
from flwr.server import ServerConfig
from flwr.server.client_manager import SimpleClientManager
from flwr.server.server import Server

from serve import serve

# A line for every round and client would be part of what is measured.
logging.getLogger("flwr").setLevel(logging.ERROR)

CONNECTED_WITHIN_S = 60
MESSAGE_BYTES_MAX = 2**31 - 1


def certificate():
    """A certificate for 127.0.0.1 that is its own authority: the chain and the key, as PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "bench")])
    now = datetime.datetime.now(datetime.timezone.utc)
    built = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return built.public_bytes(pem), private


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class OnRequest(Server):
    """Flower's server, whose rounds begin when `serve` hands on a request, and not before all clients are there."""

    def __init__(self, strategy, clients, answer):
        super().__init__(client_manager=SimpleClientManager(), strategy=strategy)
        self.clients = clients
        self.answer = answer
        self.number = 0

    def fit(self, num_rounds, timeout):
        # Flower's own handlers wait for calls that never end.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        self.parameters = self._get_initial_parameters(server_round=0, timeout=timeout)
        if not self._client_manager.wait_for(self.clients, CONNECTED_WITHIN_S):
            print(f"fewer than {self.clients} clients were there within {CONNECTED_WITHIN_S} s", file=sys.stderr)
            os._exit(1)
        serve(lambda request: self.answer(self, request))
        # The clients need no farewell: they end with this process.
        os._exit(0)

    def rounds(self, count):
        """The seconds of each of so many rounds."""
        return [self.round() for _ in range(count)]

    def round(self):
        """One round, and the seconds that it took. A client that fails is an error: it would be a smaller round."""
        self.number += 1
        began = time.perf_counter()
        done = self.fit_round(server_round=self.number, timeout=None)
        seconds = time.perf_counter() - began
        if done is None or done[0] is None or len(done[2][0]) != self.clients or done[2][1]:
            raise RuntimeError(f"round {self.number} is not of {self.clients} clients")
        self.parameters = done[0]
        return seconds


def run_server(strategy, counts, answer, arguments=()):
    """Starts a child process of as many clients as each of `counts` says, then serves requests until they end."""
    chain, key = certificate()
    address = f"127.0.0.1:{free_port()}"
    program = [sys.executable, sys.argv[0], "--clients"]
    for count in counts:
        child = subprocess.Popen([*program, str(count), address, *arguments], stdin=subprocess.PIPE, stdout=sys.stderr)
        child.stdin.write(chain)
        child.stdin.write(b"\n.\n")
        child.stdin.flush()
        OPEN.append(child)
    server = OnRequest(strategy, sum(counts), answer)
    config = ServerConfig(num_rounds=1)
    start_server(
        server_address=address,
        server=server,
        config=config,
        certificates=(chain, chain, key),
        grpc_max_message_length=MESSAGE_BYTES_MAX,
    )


# Their standard inputs stay open as long as this process lives.
OPEN = []


def run_clients(client):
    """The child's side: `--clients COUNT ADDRESS`, the authority on standard input; `client(at)` makes each client."""
    count, address = int(sys.argv[2]), sys.argv[3]
    lines = iter(sys.stdin.buffer.readline, b".\n")
    chain = b"".join(lines)

    def one(at):
        wait_for(address)
        start_client(
            server_address=address,
            client=client(at),
            root_certificates=chain,
            grpc_max_message_length=MESSAGE_BYTES_MAX,
        )

    for at in range(count):
        threading.Thread(target=one, args=(at,), daemon=True).start()
    sys.stdin.buffer.read()
    os._exit(0)


def wait_for(address):
    """Waits until the server listens: gRPC's own second try comes after a second."""
    host, port = address.split(":")
    for _ in range(CONNECTED_WITHIN_S * 100):
        try:
            socket.create_connection((host, int(port)), 1).close()
            return
        except OSError:
            time.sleep(0.01)
