"""English text that comes with Python, character by character: the help topics of its language reference."""

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from schuss.lab.workload import Task
from schuss.lab.workloads.parts import Block, Drawn, initialised, seeded

LENGTH = 64
"""Characters that are predicted in a window."""
BATCH_SIZE = 16
"""Windows in a step."""


@cache
def data() -> tuple[Tensor, Tensor, int]:
    """Text as numbers, its first nine tenths to train; windows from the last one to test; and how many characters."""
    from pydoc_data.topics import topics

    # Sorted, for their order is another one in other versions of Python.
    text = "".join(topics[name] for name in sorted(topics))
    number = {character: i for i, character in enumerate(sorted(set(text)))}
    numbers = torch.tensor([number[character] for character in text])
    split = len(numbers) * 9 // 10
    train, rest = numbers[:split], numbers[split:]
    starts = torch.linspace(0, len(rest) - LENGTH - 1, 64).long()
    return train, windows(rest, starts), len(number)


def windows(text: Tensor, starts: Tensor) -> Tensor:
    """From each start on `LENGTH` characters, and the one after them."""
    return text[starts.unsqueeze(1) + torch.arange(LENGTH + 1)]


class GPT(nn.Module):
    """A transformer that predicts the next character: Radford et al. 2019, without dropout."""

    def __init__(self, characters: int, width: int = 64, heads: int = 4, blocks: int = 2) -> None:
        super().__init__()
        self.characters = nn.Embedding(characters, width)
        self.positions = nn.Embedding(LENGTH, width)
        self.blocks = nn.Sequential(*(Block(width, heads, causal=True) for _ in range(blocks)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, characters, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the next characters."""
        stream = self.characters(x) + self.positions.weight[: x.shape[1]]
        return self.head(self.norm(self.blocks(stream)))  # type: ignore[no-any-return]


class LSTM(nn.Module):
    """A layer of long short-term memory: Hochreiter, Schmidhuber 1997."""

    def __init__(self, characters: int, width: int = 64) -> None:
        super().__init__()
        self.characters = nn.Embedding(characters, width)
        self.memory = nn.LSTM(width, width, batch_first=True)
        self.head = nn.Linear(width, characters)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the next characters."""
        return self.head(self.memory(self.characters(x))[0])  # type: ignore[no-any-return]


def char_gpt(seed: int) -> Task:
    """Python's help topics, character by character: a GPT of two layers."""
    # AdamW at 0.003 of two rates: 2.080 at most. SGD was not tried.
    return _language_model(GPT, seed, embedding_std=0.02, target=2.1)


def char_lstm(seed: int) -> Task:
    """Python's help topics, character by character: an LSTM."""
    # AdamW at 0.03 of three rates, the largest of them: 1.600 at most. SGD was not tried.
    return _language_model(LSTM, seed, embedding_std=1.0, target=1.62)


def _language_model(model: type[GPT] | type[LSTM], seed: int, *, embedding_std: float, target: float) -> Task:
    train, test, characters = data()
    order = seeded(seed)

    def draw() -> Tensor:
        return windows(train, torch.randint(len(train) - LENGTH, (BATCH_SIZE,), generator=order))

    def loss(model: nn.Module, text: Tensor) -> Tensor:
        return cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())

    return Task(
        model=initialised(lambda: model(characters), seeded(seed), embedding_std=embedding_std),
        batches=Drawn(50, draw),
        loss=loss,
        evaluate=lambda model: {"loss": loss(model, test).item()},
        metric="loss",
        target=target,
        epochs=8,
        batch_size=BATCH_SIZE,
    )
