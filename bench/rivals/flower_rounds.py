"""Flower's rounds without training: `flower_rounds.py CLIENTS PARAMETERS`.

{"rounds": N} makes N rounds and answers {"seconds": [one per round]}. Every client is a process of its own and returns
the model's bytes as they came, without making an array of them: less than any real client does. The server averages
them as Flower does.
"""

import sys

import numpy as np
from flwr.common import Code, FitRes, Status, ndarrays_to_parameters
from flwr.compat.client.client import Client
from flwr.server.strategy import FedAvg

from flower_legacy import run_clients, run_server


class Echo(Client):
    """A client that learns nothing."""

    def fit(self, ins):
        return FitRes(Status(Code.OK, ""), ins.parameters, num_examples=1000, metrics={})


def main():
    if sys.argv[1] == "--clients":
        return run_clients(lambda at: Echo())
    clients, parameters = int(sys.argv[1]), int(sys.argv[2])
    strategy = FedAvg(
        fraction_fit=1.0,
        fraction_evaluate=0.0,
        min_fit_clients=clients,
        min_available_clients=clients,
        initial_parameters=ndarrays_to_parameters([np.zeros(parameters, dtype=np.float32)]),
    )
    return run_server(strategy, [1] * clients, lambda server, request: {"seconds": server.rounds(request["rounds"])})


main()
