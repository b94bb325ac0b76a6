"""PyTorch's training step of a dense network, at its best thread count and with the fastest of its ways to follow a gradient.

A request is `{"sizes": […], "batch": n, "seconds": s}`. The first of a shape looks for what is fastest here; it and all that
follow answer with the seconds of a step, over about so long. Inputs, targets and parameters are there before the first step.
"""

import os
import time

import torch
from serve import serve

LEARNING_RATE = 0.01
SEARCH_SECONDS = 0.1

chosen = {}


def step_of(sizes, batch, way):
    """A step as PyTorch users write it: autograd, then an optimizer or an addition to all parameters at once."""
    torch.manual_seed(7)
    layers = []
    for inputs, outputs in zip(sizes, sizes[1:]):
        layers += [torch.nn.Linear(inputs, outputs), torch.nn.ReLU()]
    network = torch.nn.Sequential(*layers[:-1])
    parameters = list(network.parameters())
    x, y = torch.rand(batch, sizes[0]) * 2 - 1, torch.arange(batch) % sizes[-1]
    loss = torch.nn.functional.cross_entropy
    if way == "added":

        def step():
            gradients = torch.autograd.grad(loss(network(x), y), parameters)
            with torch.no_grad():
                torch._foreach_add_(parameters, gradients, alpha=-LEARNING_RATE)

        return step
    optimizer = torch.optim.SGD(parameters, lr=LEARNING_RATE, **{way: True})

    def optimized_step():
        optimizer.zero_grad()
        loss(network(x), y).backward()
        optimizer.step()

    return optimized_step


def seconds_a_step(step, seconds):
    for _ in range(3):
        step()
    began, steps = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        for _ in range(4):
            step()
        steps += 4
    return (time.perf_counter() - began) / steps


def fastest(sizes, batch):
    """The seconds, the threads, the name and the step of what was fastest."""
    found = []
    for threads in range(1, (os.cpu_count() or 1) + 1):
        torch.set_num_threads(threads)
        for way in ("fused", "foreach", "added"):
            step = step_of(sizes, batch, way)
            found.append((seconds_a_step(step, SEARCH_SECONDS), threads, way, step))
    return min(found, key=lambda candidate: candidate[0])


def handle(request):
    shape = (tuple(request["sizes"]), request["batch"])
    if shape not in chosen:
        chosen[shape] = fastest(*shape)
    _, threads, way, step = chosen[shape]
    torch.set_num_threads(threads)
    return {"seconds": seconds_a_step(step, request["seconds"]), "threads": threads, "way": way}


serve(handle)
