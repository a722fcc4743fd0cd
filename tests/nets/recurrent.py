"""Recurrent networks: every option of LSTM, GRU and RNN, alone and between layers that are local along time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.nets.make import net

TIME_FIRST = ((61, 2, 3),)
BATCH_FIRST = ((2, 61, 3),)
REGION = (13,)


class Alone(nn.Module):
    """The recurrent layer itself: its output and the states behind the last step, from given states or from zero."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, *states: Tensor) -> Any:
        if not states:
            return self.layer(x)
        return self.layer(x, states if len(states) > 1 else states[0])


class Tagger(nn.Module):
    """Convolution, norm, two recurrent layers and a linear layer for each step."""

    def __init__(self, layer: type[nn.RNNBase] = nn.LSTM, channels: int = 3, width: int = 6) -> None:
        super().__init__()
        self.conv = nn.Conv1d(channels, width, 5, padding=2)
        self.norm = nn.LayerNorm(width)
        self.layer = layer(width, width, 2, batch_first=True)
        self.out = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(torch.relu(self.conv(x)).transpose(1, 2))
        return self.out(self.layer(y)[0])


class LastState(nn.Module):
    """A classifier that reads the last states only: nothing asks for the output at each step."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 4, 3, padding=1)
        self.layer = layer
        self.out = nn.Linear(layer.hidden_size, 3)

    def forward(self, x: Tensor) -> Tensor:
        _, states = self.layer(self.conv(x).transpose(1, 2))
        return self.out(states[-1][-1] if isinstance(states, tuple) else states[-1])


class Decoder(nn.Module):
    """Encoder and decoder: the decoder starts from the encoder's states, and both share an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 4)
        self.encoder = nn.LSTM(4, 5)
        self.decoder = nn.LSTM(4, 5)
        self.out = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.embed(x))
        _, states = self.encoder(y)
        return self.out(self.decoder(y, states)[0])


class Parallel(nn.Module):
    """Two recurrent layers and a skip side by side, then a mean over time."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.GRU(3, 4), nn.RNN(3, 4)
        self.skip = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.a(x)[0] * self.b(x)[0] + self.skip(x)
        return y, y.mean(0)


class Words(nn.Module):
    """Indices into a table, a GRU, a score for each index."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 4, padding_idx=0)
        self.layer = nn.GRU(4, 5, batch_first=True)
        self.out = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layer(self.table((x.abs() * 4).long().clamp(max=8)))[0])


class Columns(nn.Module):
    """A picture read as a series of its columns, as in text recognition."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.pool = nn.MaxPool2d((2, 1))
        self.layer = nn.LSTM(4 * 6, 5, bidirectional=True)
        self.next = nn.LSTM(10, 4)
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.pool(torch.relu(self.conv(x)))
        y = y.flatten(1, 2).permute(2, 0, 1)
        return self.out(self.next(self.layer(y)[0])[0])


class Cells(nn.Module):
    """Cells in a Python loop: ordinary operators, step by step."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.ModuleList([nn.LSTMCell(3, 4), nn.GRUCell(4, 4), nn.RNNCell(4, 3)])

    def forward(self, x: Tensor) -> Tensor:
        first: Any = None
        second: Any = None
        third: Any = None
        steps = []
        for step in x.unbind(0):
            first = self.cells[0](step, first)
            second = self.cells[1](first[0], second)
            third = self.cells[2](second, third)
            steps.append(third)
        return torch.stack(steps)


def alone(name: str, layer: type[nn.RNNBase], *shapes: tuple[int, ...], **options: Any) -> Any:
    """An entry with the recurrent layer itself."""
    sizes = shapes or (BATCH_FIRST if options.get("batch_first") else TIME_FIRST)
    return net(name, lambda: Alone(layer(3, 4, **options)), tuple(sizes), REGION)


RECURRENT = (
    alone("lstm", nn.LSTM),
    alone("lstm_batch_first_states", nn.LSTM, (2, 61, 3), (1, 2, 4), (1, 2, 4), batch_first=True),
    alone("lstm_deep_both_ways", nn.LSTM, num_layers=2, bidirectional=True, batch_first=True),
    alone("lstm_projected", nn.LSTM, (61, 2, 3), (4, 2, 2), (4, 2, 4), num_layers=2, bidirectional=True, proj_size=2),
    alone("lstm_without_bias", nn.LSTM, num_layers=3, bias=False),
    alone("lstm_of_one_sample", nn.LSTM, (61, 3), (2, 4), (2, 4), num_layers=2),
    alone("lstm_one_step", nn.LSTM, (1, 2, 3)),
    alone("gru_states", nn.GRU, (61, 2, 3), (2, 2, 4), num_layers=2),
    alone("gru_both_ways", nn.GRU, bidirectional=True, bias=False),
    alone("gru_of_one_sample", nn.GRU, (61, 3)),
    alone("rnn_tanh", nn.RNN, num_layers=2, batch_first=True),
    alone("rnn_relu", nn.RNN, (61, 2, 3), (2, 2, 4), nonlinearity="relu", bidirectional=True),
    net("tagger_lstm", Tagger, ((2, 3, 61),), REGION),
    net("tagger_gru", lambda: Tagger(nn.GRU), ((2, 3, 61),), REGION),
    net("last_state", lambda: LastState(nn.LSTM(4, 5, 2, batch_first=True)), ((2, 3, 61),), REGION),
    net("last_state_both_ways", lambda: LastState(nn.GRU(4, 5, bidirectional=True, batch_first=True)), ((2, 3, 61),),
        REGION),
    net("encoder_decoder", Decoder, TIME_FIRST, REGION),
    net("parallel_recurrences", Parallel, TIME_FIRST, REGION),
    net("words", Words, ((2, 61),), REGION),
    net("columns", Columns, ((2, 3, 13, 41),), (11, 17)),
    net("recurrent_cells", Cells, ((7, 2, 3),), (3,)),
)  # fmt: skip
