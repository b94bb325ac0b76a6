"""McMahan's 2NN on MNIST in PyTorch, for the programs beside this one.

The data are the directory that the bench has made: `000` to `099` with the shard of a worker each, in idx format, and
the test set beside them. Both programs answer the same requests: {"until": A, "most": N} says in {"rounds": N} after how
many rounds from the initial weights the test accuracy is A; {"begin": true} goes back to them; {"rounds": N} goes on by N
rounds and says in {"seconds": S} how long they took.

Pixels are `x / 255`, and one thread computes: with two a step of this size takes longer.
"""

import pathlib
import time

import numpy as np
import torch

BATCH = 10
LEARNING_RATE = 0.05
SHARDS = 100
CHOSEN = 10

torch.set_num_threads(1)


def images_and_labels(directory, name):
    pixels = np.fromfile(directory / f"{name}-images-idx3-ubyte", dtype=np.uint8, offset=16).reshape(-1, 784)
    labels = np.fromfile(directory / f"{name}-labels-idx1-ubyte", dtype=np.uint8, offset=8)
    return torch.from_numpy(pixels).float() / 255, torch.from_numpy(labels).long()


class Data:
    """All shards and the test set."""

    def __init__(self, directory):
        directory = pathlib.Path(directory)
        self.shards = [images_and_labels(directory / f"{shard:03}", "train") for shard in range(SHARDS)]
        self.test = images_and_labels(directory, "t10k")


def network():
    relu, linear = torch.nn.ReLU, torch.nn.Linear
    return torch.nn.Sequential(linear(784, 200), relu(), linear(200, 200), relu(), linear(200, 10))


def initial():
    """The weights before round 1, as PyTorch draws them."""
    torch.manual_seed(7)
    return [parameter.detach().numpy().copy() for parameter in network().parameters()]


def chosen(number):
    """The shards of a round."""
    return np.random.default_rng((7, number)).choice(SHARDS, CHOSEN, replace=False).tolist()


class Trainer:
    """A network that trains from whatever weights it is given.

    Steps go through autograd and not through `torch.optim`, whose bookkeeping is a fifth of a step of this size.
    """

    def __init__(self):
        self.network = network()
        self.parameters = list(self.network.parameters())

    def set(self, weights):
        with torch.no_grad():
            for parameter, weight in zip(self.parameters, weights):
                parameter.copy_(torch.from_numpy(weight))

    def train(self, weights, shard, key):
        """One epoch in an order of its own; gives the weights after it, which live until the next."""
        self.set(weights)
        inputs, labels = shard
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(key))
        # Gathered once: batches are then views.
        inputs, labels = inputs[order], labels[order]
        for x, y in zip(inputs.split(BATCH), labels.split(BATCH)):
            loss = torch.nn.functional.cross_entropy(self.network(x), y)
            gradients = torch.autograd.grad(loss, self.parameters)
            with torch.no_grad():
                for parameter, gradient in zip(self.parameters, gradients):
                    parameter.add_(gradient, alpha=-LEARNING_RATE)
        return [parameter.detach().numpy() for parameter in self.parameters]

    def accuracy(self, weights, test):
        self.set(weights)
        with torch.no_grad():
            return (self.network(test[0]).argmax(1) == test[1]).float().mean().item()


def answer(rounds, request):
    """What is asked of `rounds`, which can `begin`, make a `round` and tell the `accuracy` that is reached."""
    if "until" in request:
        return {"rounds": first_round(rounds, request["until"], request["most"])}
    if "begin" in request:
        rounds.begin()
        return {}
    began = time.perf_counter()
    for _ in range(request["rounds"]):
        rounds.round()
    return {"seconds": time.perf_counter() - began, "accuracy": rounds.accuracy()}


def first_round(rounds, accuracy, most):
    rounds.begin()
    for number in range(1, most + 1):
        rounds.round()
        if rounds.accuracy() >= accuracy:
            return number
    raise RuntimeError(f"no accuracy of {accuracy} within {most} rounds")
