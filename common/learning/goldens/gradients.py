"""Gradients and SGD steps of the models as PyTorch computes them, for tests/goldens.rs.

    python gradients.py > gradients.json        (PyTorch 2.15, CPU)

Inputs and weights are 32-bit floats; PyTorch computes on them in 64 bits, so that what is left in a comparison is the
rounding of our side.
"""

import json
import sys

import torch

CASES = {
    "linear_two_classes": dict(inputs=5, hidden=[], outputs=2, rows=16),
    "linear_four_classes": dict(inputs=6, hidden=[], outputs=4, rows=16),
    "linear_regression": dict(inputs=5, hidden=[], outputs=1, rows=16),
    "mlp_two_classes": dict(inputs=5, hidden=[8], outputs=2, rows=16),
    "mlp_three_classes": dict(inputs=7, hidden=[8, 6], outputs=3, rows=16),
    "mlp_regression": dict(inputs=5, hidden=[8, 4], outputs=1, rows=16),
}
LEARNING_RATE, MOMENTUM, STEPS = 0.05, 0.9, 5


def forward(parameters, x):
    for at in range(0, len(parameters), 2):
        bias, weight = parameters[at : at + 2]
        x = torch.nn.functional.linear(x, weight, bias)
        if at + 2 < len(parameters):
            x = torch.relu(x)
    return x


def loss_of(parameters, x, y, outputs):
    if outputs == 1:
        return torch.nn.functional.mse_loss(forward(parameters, x)[:, 0], y)
    return torch.nn.functional.cross_entropy(forward(parameters, x), y.long())


def flat(tensors):
    return [number for tensor in tensors for number in tensor.detach().flatten().tolist()]


def case(inputs, hidden, outputs, rows):
    widths = [inputs, *hidden, outputs]
    x = torch.randn(rows, inputs, dtype=torch.float32).double()
    y = torch.randint(outputs, (rows,)).double() if outputs > 1 else torch.randn(rows, dtype=torch.float32).double()
    # Bias before weight, layer after layer: the order of the layout.
    shapes = [shape for n, m in zip(widths, widths[1:]) for shape in ((m,), (m, n))]
    weights = [(torch.randn(shape, dtype=torch.float32) * 0.5).double() for shape in shapes]
    golden = dict(inputs=inputs, hidden=hidden, outputs=outputs, x=x.flatten().tolist(), y=y.tolist(), weights=flat(weights))

    parameters = [weight.clone().requires_grad_() for weight in weights]
    loss = loss_of(parameters, x, y, outputs)
    golden["loss"] = loss.item()
    golden["gradient"] = flat(torch.autograd.grad(loss, parameters))

    sgd = torch.optim.SGD(parameters, lr=LEARNING_RATE, momentum=MOMENTUM)
    for _ in range(STEPS):
        sgd.zero_grad()
        loss_of(parameters, x, y, outputs).backward()
        sgd.step()
    golden["stepped"] = flat(parameters)
    return golden


torch.manual_seed(7)
cases = {name: case(**shape) for name, shape in CASES.items()}
golden = dict(torch=torch.__version__, learning_rate=LEARNING_RATE, momentum=MOMENTUM, steps=STEPS, cases=cases)
json.dump(golden, sys.stdout, indent=1)
print()
