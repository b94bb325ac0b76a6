"""Federated averaging in plain PyTorch, without any network: `torch_mnist.py DIRECTORY`, as `mnist.py` says.

Each of two forked workers trains half of a round's shards, one after another, and adds the weights up in memory that it
shares with this process.
"""

import multiprocessing
import sys

import numpy as np
import torch

from mnist import CHOSEN, Data, Trainer, answer, chosen, initial
from serve import serve

WORKERS = 2


def shared(arrays):
    """Arrays of these shapes in memory that forked processes share."""
    return [torch.zeros(array.shape).share_memory_().numpy() for array in arrays]


def work(data, model, sums, orders, done):
    trainer = Trainer()
    while True:
        number, shards = orders.recv()
        for sum in sums:
            sum[...] = 0
        for shard in shards:
            for sum, weight in zip(sums, trainer.train(model, data.shards[shard], number * 1000 + shard)):
                sum += weight
        done.send(None)


class Rounds:
    """The workers and the model, for `mnist.answer`."""

    def __init__(self, directory):
        self.data = Data(directory)
        self.model = shared(initial())
        self.workers = []
        context = multiprocessing.get_context("fork")
        for _ in range(WORKERS):
            sums = shared(self.model)
            (their_orders, orders), (done, their_done) = context.Pipe(False), context.Pipe(False)
            arguments = (self.data, self.model, sums, their_orders, their_done)
            context.Process(target=work, args=arguments, daemon=True).start()
            self.workers.append((sums, orders, done))
        self.judge = Trainer()

    def begin(self):
        self.number = 0
        for model, first in zip(self.model, initial()):
            model[...] = first

    def round(self):
        self.number += 1
        shards = chosen(self.number)
        for at, (_, orders, _) in enumerate(self.workers):
            orders.send((self.number, shards[at::WORKERS]))
        for _, _, done in self.workers:
            done.recv()
        for at, model in enumerate(self.model):
            np.divide(sum(sums[at] for sums, _, _ in self.workers), CHOSEN, out=model)

    def accuracy(self):
        return self.judge.accuracy(self.model, self.data.test)


rounds = Rounds(sys.argv[1])
rounds.begin()
serve(lambda request: answer(rounds, request))
