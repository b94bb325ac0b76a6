"""Federated averaging with Flower in its fastest arrangement: `flower_mnist.py DIRECTORY`, as `mnist.py` says.

Ten connections from two processes; in each round every connection trains on another one of the round's ten shards, so
that no more connections are open than have work. In each process one client trains at a time, the others wait for it or
for the network: several at once hold one another up in Python's interpreter.
"""

import sys
import threading

from flwr.common import FitIns, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.compat.client.numpy_client import NumPyClient
from flwr.server.strategy import FedAvg

from flower_legacy import run_clients, run_server
from mnist import CHOSEN, Data, Trainer, answer, chosen, initial


class Shards(NumPyClient):
    """A client that trains on whichever shard it is told."""

    def __init__(self, data, turn):
        self.data, self.turn, self.trainer = data, turn, Trainer()

    def fit(self, parameters, config):
        with self.turn:
            shard = self.data.shards[config["shard"]]
            weights = self.trainer.train(parameters, shard, config["key"])
        return weights, len(shard[1]), {}


class Chosen(FedAvg):
    """Flower's averaging, with a shard for each client."""

    def configure_fit(self, server_round, parameters, client_manager):
        fits = super().configure_fit(server_round, parameters, client_manager)
        config = lambda shard: {"shard": shard, "key": server_round * 1000 + shard}
        return [(client, FitIns(parameters, config(shard))) for (client, _), shard in zip(fits, chosen(server_round))]


class Rounds:
    """The rounds of Flower's server, for `mnist.answer`."""

    def __init__(self, server, data):
        self.server, self.data, self.judge = server, data, Trainer()

    def begin(self):
        self.server.parameters, self.server.number = ndarrays_to_parameters(initial()), 0

    def round(self):
        self.server.round()

    def accuracy(self):
        return self.judge.accuracy(parameters_to_ndarrays(self.server.parameters), self.data.test)


def main():
    if sys.argv[1] == "--clients":
        data, turn = Data(sys.argv[4]), threading.Lock()
        return run_clients(lambda at: Shards(data, turn))
    data = Data(sys.argv[1])
    strategy = Chosen(
        fraction_fit=1.0,
        fraction_evaluate=0.0,
        min_fit_clients=CHOSEN,
        min_available_clients=CHOSEN,
        initial_parameters=ndarrays_to_parameters(initial()),
    )
    respond = lambda server, request: answer(Rounds(server, data), request)
    return run_server(strategy, [CHOSEN // 2, CHOSEN // 2], respond, [sys.argv[1]])


main()
