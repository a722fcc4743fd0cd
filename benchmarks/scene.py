"""A picture larger than memory, from file to file.

python -m benchmarks.scene                        20,000 x 20,000 x 3, tiled TIFF, --memory 1GB, against 2048 x 2048 in memory
python -m benchmarks.scene --side 6000            smaller
python -m benchmarks.scene --kills 20             one run killed 20 times beside one that is not: the same bytes
python -m benchmarks.scene --monai                what MONAI's sliding window with its stitched output needs, by its shapes

The network is a U-Net on MobileNetV2's features. Peaks are of the resident set of a process of its own, over what it
holds before the run (model and input open). Time in kernels is that of PyTorch's operators, joins of kept rows and the
reduction included; the rest is the loop, waiting for files and the last pass over the output.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import ranger_nn
from ranger_nn.execute.allocator import keep_freed_blocks
from ranger_nn.planning.budget import parse_memory
from ranger_nn.torch.prepare import prepare

TIME_TARGET, MEMORY_TARGET, KERNEL_TARGET = 1.15, 1.15, 0.90
REFERENCE = 2048


def block(inputs: int, outputs: int, stride: int = 1, expand: int = 4) -> nn.Module:
    """An inverted residual without the sum (Sandler et al. 2018)."""
    wide = inputs * expand
    return nn.Sequential(
        nn.Conv2d(inputs, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU6(),
        nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False), nn.BatchNorm2d(wide), nn.ReLU6(),
        nn.Conv2d(wide, outputs, 1, bias=False), nn.BatchNorm2d(outputs),
    )  # fmt: skip


class MobileUNet(nn.Module):
    """Inverted residuals down to 1/16, and up again with skip connections; two classes."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        w = [width * 2**k for k in range(5)]
        self.stem = nn.Sequential(nn.Conv2d(3, w[0], 3, 2, 1, bias=False), nn.BatchNorm2d(w[0]), nn.ReLU6())
        self.down = nn.ModuleList([block(a, b, 2) for a, b in itertools.pairwise(w[:4])])
        self.deep = block(w[3], w[3])
        self.up = nn.ModuleList([block(a + b, b, expand=2) for a, b in zip(w[3:0:-1], w[2::-1])])
        self.head = nn.Conv2d(w[0], 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the input's size, for multiples of 16."""
        y = self.stem(x)
        skips = []
        for down in self.down:
            skips.append(y)
            y = down(y)
        y = self.deep(y)
        for up, skip in zip(self.up, reversed(skips)):
            y = up(torch.cat([nn.functional.interpolate(y, scale_factor=2.0, mode="nearest"), skip], 1))
        return nn.functional.interpolate(self.head(y), scale_factor=2.0, mode="nearest")


def model() -> nn.Module:
    """The network with fixed weights and the statistics of random pictures."""
    torch.manual_seed(0)
    net = MobileUNet()
    with torch.no_grad():
        net.train()(torch.rand(2, 3, 256, 256))
    return net.eval()


def write_scene(path: Path, side: int) -> None:
    """A tiled TIFF of smooth noise, made tile by tile."""
    import tifffile

    rng = np.random.default_rng(0)
    tile = 256
    coarse = rng.integers(0, 256, (tile // 8 + 1, tile // 8 + 1, 3), dtype=np.uint8)
    base = np.kron(coarse, np.ones((8, 8, 1), np.uint8))[:tile, :tile]

    def tiles():  # type: ignore[no-untyped-def]
        for k in range((side + tile - 1) // tile * ((side + tile - 1) // tile)):
            yield np.roll(base, (k * 7, k * 13), (0, 1)) ^ np.uint8(k % 64)

    tifffile.imwrite(
        path, tiles(), shape=(side, side, 3), dtype=np.uint8, tile=(tile, tile), photometric="rgb", bigtiff=True
    )


class Sampler:
    """The largest resident set while it runs, read from /proc every few milliseconds by another thread."""

    def __init__(self) -> None:
        import threading

        self.most = self.now()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    @staticmethod
    def now() -> int:
        """Bytes resident."""
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()

    def _work(self) -> None:
        while not self._stop.wait(0.01):
            self.most = max(self.most, self.now())

    def stop(self) -> int:
        """The most."""
        self._stop.set()
        self._thread.join()
        return self.most


def streamed(scene: str, out: str, memory: str, threads: int) -> None:
    """One run in this process; a line of JSON."""
    torch.set_num_threads(threads)
    keep_freed_blocks()  # as `ranger-nn run` does
    net = model()
    idle = Sampler.now()
    sampler = Sampler()
    start = time.perf_counter()
    prepared = prepare(net, scene, memory)
    planning = time.perf_counter() - start
    kernels = [0.0]
    import ranger_nn.execute.files.handle as files

    plain = files.FileEngine.bind

    def timed(self, i):  # type: ignore[no-untyped-def]
        function = plain(self, i)
        if i.op == "alloc":
            return function

        def call(*args):  # type: ignore[no-untyped-def]
            begun = time.perf_counter()
            result = function(*args)
            kernels[0] += time.perf_counter() - begun
            return result

        return call

    joined = files.FileEngine.join

    def join(self, parts, dim):  # type: ignore[no-untyped-def]
        begun = time.perf_counter()
        result = joined(self, parts, dim)
        kernels[0] += time.perf_counter() - begun
        return result

    files.FileEngine.bind = timed  # type: ignore[method-assign]
    files.FileEngine.join = join  # type: ignore[method-assign]
    report = ranger_nn.run(net, scene, out, reduce="argmax", prepared=prepared)
    print(json.dumps({
        "idle": idle, "peak": sampler.stop(), "seconds": report.seconds, "planning": planning, "waited": report.waited,
        "kernels": kernels[0] - report.waited, "projected": prepared.projected, "read": report.bytes_read,
        "regions": report.regions, "resumed": report.resumed_at, "expected": prepared.expected_seconds(), "histogram": report.statistics,
    }))  # fmt: skip


def in_memory(repeats: int) -> float:
    """Seconds of the untouched network on a picture that fits: each pixel."""
    net, x = model(), torch.rand(1, 3, REFERENCE, REFERENCE)
    taken = []
    with torch.no_grad():
        for _ in range(repeats + 1):
            start = time.perf_counter()
            net(x).argmax(1).to(torch.uint8)
            taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:]) / REFERENCE**2


def child(*arguments: str) -> dict[str, float]:
    """`streamed` in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.scene", *arguments], check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def killed(folder: Path, scene: Path, memory: str, kills: int) -> None:
    """A run killed again and again beside one that is not: at random moments of random regions, and before the first."""
    whole, cut = folder / "whole.npy", folder / "cut.npy"
    regions = int(child("--streamed", str(scene), str(whole), "--memory", memory)["regions"])
    journal, source = folder / ".cut.npy.partial" / "journal.json", random.Random(0)

    def done() -> int:
        return json.loads(journal.read_text())["done"] if journal.exists() else 0

    command = [sys.executable, "-m", "benchmarks.scene", "--streamed", str(scene), str(cut), "--memory", memory]
    for k, wanted in enumerate([0, *sorted(source.sample(range(1, regions), kills - 1))]):
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            while process.poll() is None and done() < wanted:
                time.sleep(0.01)
            time.sleep(source.uniform(0, 0.3))
            if process.poll() is not None:
                raise RuntimeError(f"the run ended before its region {wanted} of {regions}")
            process.send_signal(signal.SIGKILL)
        print(f"killed {k + 1}: {done()} of {regions} regions done", flush=True)
    before = done()
    found = child("--streamed", str(scene), str(cut), "--memory", memory)
    same = whole.read_bytes() == cut.read_bytes()
    print(
        f"the same bytes after {kills} kills: {same}; the last run began after region {before} ({found['resumed']:.0f})"
    )


def monai(side: int) -> None:
    """What its sliding window keeps: the picture, the stitched logits and the weights, float32."""
    classes = 2
    picture, stitched, weights = 3 * side**2 * 4, classes * side**2 * 4, side**2 * 4
    total = picture + stitched + weights
    print(
        f"MONAI SlidingWindowInferer: input {picture / 1e9:.1f} GB, stitched logits {stitched / 1e9:.1f} GB, count map "
        f"{weights / 1e9:.1f} GB: {total / 1e9:.1f} GB before a window is computed (and then argmax); ours 1 GB"
    )


def main() -> None:
    """Both sides in one run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=20000)
    parser.add_argument("--memory", default="1GB")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--monai", action="store_true")
    parser.add_argument("--streamed", nargs=2, metavar=("SCENE", "OUT"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.streamed:
        streamed(*given.streamed, given.memory, given.threads)
        return
    if given.monai:
        monai(given.side)
        return
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as name:
        folder = Path(name)
        scene = folder / "scene.tif"
        write_scene(scene, given.side)
        if given.kills:
            killed(folder, scene, given.memory, given.kills)
            return
        before = in_memory(given.repeats)
        found = child("--streamed", str(scene), str(folder / "labels.zarr"), "--memory", given.memory)
        after = in_memory(given.repeats)
        plain = (before + after) / 2
        allowed = parse_memory(given.memory) or 0
        ratio, rise = found["seconds"] / given.side**2 / plain, (found["peak"] - found["idle"]) / allowed
        share = found["kernels"] / found["seconds"]
        for text, value, target, least in (
            ("time per pixel against 2048 x 2048 in memory", ratio, TIME_TARGET, False),
            ("peak over idle against the memory allowed", rise, MEMORY_TARGET, False),
            ("share of the time in kernels", share, KERNEL_TARGET, True),
        ):
            missed = value < target if least else value > target
            print(f"{text}: {value:.2f} ({'>=' if least else '<='} {target:.2f}){' MISSED' if missed else ''}")
        print(
            f"{given.side} x {given.side}: {found['seconds']:.0f} s (expected {found['expected']:.0f} s), "
            f"{found['regions']:.0f} regions, planning {found['planning']:.1f} s, projected {found['projected'] / 1e6:.0f} MB, "
            f"peak over idle {(found['peak'] - found['idle']) / 1e6:.0f} MB, read {found['read'] / (3 * given.side**2):.3f} "
            "of the input's bytes"
        )
        monai(given.side)


if __name__ == "__main__":
    main()
