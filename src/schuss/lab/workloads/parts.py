"""What the workloads are put together from. Each draws from generators of its own, never from torch's global one."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention


def seeded(seed: int) -> torch.Generator:
    """A generator on the CPU."""
    return torch.Generator().manual_seed(seed)


class Shuffled:
    """Batches of rows of tensors; each epoch in another order.

    Args:
        data: tensors of equal length.
        batch_size: rows in a batch.
        generator: of the order.
        drop_last: whether to leave out the rows that fill no batch.
    """

    def __init__(
        self, data: tuple[Tensor, ...], batch_size: int, generator: torch.Generator, *, drop_last: bool = False
    ) -> None:
        self._data, self._batch_size, self._generator = data, batch_size, generator
        whole, rest = divmod(len(data[0]), batch_size)
        self._count = whole + (rest > 0 and not drop_last)

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        order = torch.randperm(len(self._data[0]), generator=self._generator)
        for rows in order.split(self._batch_size)[: self._count]:
            yield tuple(part[rows] for part in self._data)


class Drawn:
    """Batches without end, each drawn when it is asked for; so many of them are called an epoch."""

    def __init__(self, count: int, draw: Callable[[], Any]) -> None:
        self._count, self._draw = count, draw

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Any]:
        for _ in range(self._count):
            yield self._draw()


def initialised(build: Callable[[], nn.Module], generator: torch.Generator, *, embedding_std: float = 1.0) -> nn.Module:
    """A model with torch's initialisation, to the bit what torch's global generator would give from the same seed.

    Args:
        build: makes it, of layers that are named below and others without parameters.
        generator: of the weights.
        embedding_std: standard deviation of embeddings; torch's is 1.
    """
    with torch.device("meta"):  # layers draw weights when they are made; there, nothing is drawn
        model = build()
    model.to_empty(device="cpu")
    for layer in model.modules():
        match layer:
            case nn.Linear() | nn.Conv2d():
                nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5), generator=generator)
                if layer.bias is not None:
                    bound = 1 / math.sqrt(layer.weight[0].numel())
                    nn.init.uniform_(layer.bias, -bound, bound, generator=generator)
            case nn.LSTM():
                bound = 1 / math.sqrt(layer.hidden_size)
                for weight in layer.parameters():
                    nn.init.uniform_(weight, -bound, bound, generator=generator)
            case nn.Embedding() | nn.EmbeddingBag():
                nn.init.normal_(layer.weight, std=embedding_std, generator=generator)
            case nn.LayerNorm():
                layer.reset_parameters()
            case _ if next(layer.parameters(recurse=False), None) is not None:
                raise TypeError(f"initialised: no rule for the parameters of a {type(layer).__name__}")
    return model


def supervised(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[nn.Module, tuple[Tensor, Tensor]], Tensor]:
    """The loss of a batch (x, y)."""
    return lambda model, batch: loss(model(batch[0]), batch[1])


def mean_loss(
    loss: Callable[[Tensor, Tensor], Tensor], data: tuple[Tensor, Tensor]
) -> Callable[[nn.Module], dict[str, float]]:
    """An evaluation: the loss of all of `data` at once."""
    return lambda model: {"loss": loss(model(data[0]), data[1]).item()}


def loss_and_accuracy(data: tuple[Tensor, Tensor]) -> Callable[[nn.Module], dict[str, float]]:
    """An evaluation of a classifier: cross-entropy in nats, and the share of right answers."""
    x, y = data

    def evaluate(model: nn.Module) -> dict[str, float]:
        logits = model(x)
        right = (logits.argmax(dim=1) == y).double().mean()
        return {"loss": cross_entropy(logits, y).item(), "accuracy": right.item()}

    return evaluate


class Block(nn.Module):
    """A layer of a transformer: attention and a perceptron, each after a norm and beside a shortcut.

    Args:
        width: of the residual stream.
        heads: of attention; they divide the width.
        causal: whether a position sees only those before it.
    """

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self._heads, self._causal = heads, causal
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Of shape (batch, positions, width), as its result is."""
        n, length, width = x.shape
        q, k, v = self.qkv(self.attention_norm(x)).view(n, length, 3, self._heads, -1).permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(q, k, v, is_causal=self._causal)
        x = x + self.out(mixed.transpose(1, 2).reshape(n, length, width))
        return x + self.mlp(x)  # type: ignore[no-any-return]
