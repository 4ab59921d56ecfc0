"""A new optimizer in one class: declare the formula, and every back end, checkpoint and test comes with it.

Tiger (Su 2023) is Lion with one decay rate: p moves by lr * sign(m), where m averages the gradients.
"""

import torch

import schuss
from schuss.formula import lerp, sign
from schuss.testing import check_optimizer


class Tiger(schuss.Optimizer):
    """Sign of the momentum, with decoupled weight decay.

    Args:
        params: tensors, (name, tensor) pairs, or groups as dicts.
        lr: size of a step of each element, in [0, inf).
        beta: decay rate of the momentum, in [0, 1).
        weight_decay: decoupled, in [0, inf).
    """

    bounds = {"lr": "[0, inf)", "beta": "[0, 1)", "weight_decay": "[0, inf)"}
    states = {"m": "exp_avg"}
    has_step = False
    decay = "decoupled"
    source = "Su 2023"

    def __init__(self, params, lr=1e-3, beta=0.965, weight_decay=0.01, **options):
        super().__init__(params, dict(lr=lr, beta=beta, weight_decay=weight_decay), **options)

    @staticmethod
    def scalars(beta):
        return {"w": 1 - beta}

    @staticmethod
    def rule(p, g, m, lr, w):
        m = lerp(m, g, w)
        return p - lr * sign(m), m


if __name__ == "__main__":
    check_optimizer(Tiger)
    model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
    optimizer = Tiger(model.named_parameters(), lr=1e-3)
    x = torch.randn(256, 8)
    for step in range(200):
        loss = (model(x) - x.sin().sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step:3d}  loss {loss.item():.3f}")
    print(optimizer.plan())
