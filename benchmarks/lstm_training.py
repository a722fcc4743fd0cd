"""Recurrent layers by regions of time beside PyTorch's own: LSTM and GRU in training, a tagger in inference.

python -m benchmarks.lstm_training                 T = 32768, batch 8, hidden 64 (GRU: a sixteenth of the steps)
python -m benchmarks.lstm_training --size 4096     fewer steps

The tables count as all benchmarks here do: the input exists before, the final output is left out on both sides. The
line below the first counts everything that forward and backward of the LSTM allocate, the output and the input's gradient too.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

import ranger_nn
from benchmarks.common import Case, Options, Work, compare, judged, megabytes, options, peak, show

STEPS, BATCH, WIDTH, SHARE, TIME = 32768, 8, 64, 1 / 6, 1.1


class Output(nn.Module):
    """A recurrent layer's output at each step."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """(steps, batch, features) -> (steps, batch, hidden)."""
        return self.layer(x)[0]


class Tagger(nn.Module):
    """Convolution, LSTM and a linear layer for each step."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 5, padding=2)
        self.lstm = nn.LSTM(WIDTH, WIDTH, batch_first=True)
        self.out = nn.Linear(WIDTH, 16)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, channels, steps) -> (batch, steps, labels)."""
        y = torch.relu(self.conv(x)).transpose(1, 2)
        return self.out(self.lstm(y)[0])


def cases(chosen: Options) -> list[Case]:
    """The LSTM at its target, the GRU and the tagger at the same."""
    torch.manual_seed(0)
    steps = chosen.side(STEPS)
    few = max(64, steps // 16)
    lstm, gru = (chosen.place(Output(kind(WIDTH, WIDTH))) for kind in (nn.LSTM, nn.GRU))
    x, short = chosen.draw(steps, BATCH, WIDTH), chosen.draw(few, BATCH, WIDTH)
    series = chosen.draw(BATCH, WIDTH, steps)
    return [
        Case(f"LSTM {steps}x{BATCH}x{WIDTH}, forward + backward", lstm, x, SHARE, train=True, time_target=TIME),
        Case(f"GRU {few}x{BATCH}x{WIDTH}, forward + backward", gru, short, SHARE, train=True),
        Case(f"Conv1d + LSTM + Linear, {BATCH}x{WIDTH}x{steps}", chosen.place(Tagger()), series, SHARE),
    ]


def everything(model: nn.Module, x: Tensor, weights: Tensor) -> Work:
    """Forward and backward whose output and input gradient count as well."""

    def work() -> tuple[Tensor, ...]:
        model.zero_grad(set_to_none=True)
        given = x.detach().requires_grad_()
        model(given).backward(weights)
        return ()

    return work


def all_counted(case: Case, chosen: Options) -> str:
    """The peak of the LSTM with nothing left out."""
    small = ranger_nn.regionalize(copy.deepcopy(case.model))
    with torch.no_grad():
        weights = torch.ones_like(case.model(case.x))
    found = []
    for model in (case.model, small):
        work = everything(model, case.x, weights)
        work()
        found.append(peak(work, model, chosen.device))
    ratio = judged(found[1] / found[0], SHARE, "{:.3f}")
    return f"{case.work}, output and input gradient counted: {megabytes(found[0])} MB, ours {megabytes(found[1])} MB, {ratio}"


def main() -> None:
    """A table for each case, and the line below the first."""
    chosen = options()
    work = cases(chosen)
    for n, case in enumerate(work):
        show([compare(case, chosen)])
        if not n:
            print(all_counted(case, chosen), flush=True)


if __name__ == "__main__":
    main()
