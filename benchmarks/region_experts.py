"""RegionExperts: time beside all experts at once and beside loops over regions; accuracy beside dense networks.

python -m benchmarks.region_experts

Samples are drawn around as many centres as there are regions, and `adapt` finds them. Every side routes by the same
centres. "all": every expert on every sample in one batched call, then each sample's own is picked. "loop": each expert,
a module of its own, on the samples of its region: `m = route == r; y[m] = expert[r](x[m])`. "sorted loop": the same
without masks: samples sorted once, split, joined once; no target.
Training is forward and backward, with the centres at rest. With 256 regions each side takes turns of ten calls; a single
call after a call of the other side is printed as well.

Accuracy, median of seeds: digits (scikit-learn's 8 x 8, 1300 to train on), and piecewise regression, inputs gathered
around the sites of the cells or uniform. Beside the experts stand a dense network of equal multiply-adds for a sample
(the routing counted) and one of equal parameters; same steps, same optimiser,
each with the learning rate of four that does best on a quarter of the training data.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap

from benchmarks.common import Work, difference, interleaved
from ranger_nn import KMeans
from ranger_nn.torch import RegionExperts

CALLS = 10
RATES = (3e-3, 1e-2, 3e-2, 1e-1)


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """One hidden layer."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


# ------------------------------------------------------------------------------------------ time


def clustered(samples: int, features: int, regions: int) -> Tensor:
    """Samples around `regions` centres."""
    centres = 3 * torch.randn(regions, features)
    return centres[torch.randint(regions, (samples,))] + torch.randn(samples, features)


def all_of(layer: RegionExperts, x: Tensor) -> Tensor:
    """Every expert on every sample, then each sample's own."""
    region = torch.cdist(x.detach(), layer.clusters.centres).argmin(1)
    state = {n: getattr(layer.local, n.replace(".", "/")) for n in layer.local._names}
    y = vmap(lambda own: functional_call(layer.local.module, own, (x,)))(state)
    return y[region, torch.arange(len(x))]


def loop_of(layer: RegionExperts, experts: nn.ModuleList, x: Tensor) -> Tensor:
    """A loop over regions as one writes it: each expert, a module of its own, on the samples of its region."""
    region = torch.cdist(x.detach(), layer.clusters.centres).argmin(1)
    y = torch.zeros_like(x)
    for r, expert in enumerate(experts):
        picked = region == r
        y[picked] = expert(x[picked])
    return y


def sorted_loop_of(layer: RegionExperts, experts: nn.ModuleList, x: Tensor) -> Tensor:
    """The same loop with samples sorted by region once, as fast as we can write one."""
    region = torch.cdist(x.detach(), layer.clusters.centres).argmin(1)
    order = region.argsort()
    parts = x[order].split(torch.bincount(region, minlength=len(experts)).tolist())
    y = torch.cat([expert(part) for expert, part in zip(experts, parts) if len(part)])
    return torch.empty_like(x).index_copy(0, order, y)


def modules_of(layer: RegionExperts) -> nn.ModuleList:
    """The experts as separate modules."""
    experts = nn.ModuleList([copy.deepcopy(layer.local.module) for _ in range(layer.local.regions)])
    for r, expert in enumerate(experts):
        own = {n: getattr(layer.local, n.replace(".", "/"))[r] for n in expert.state_dict()}
        expert.load_state_dict(own)
    return experts


def works(run: Callable[[Tensor], Tensor], owner: nn.Module, x: Tensor) -> tuple[Work, Work]:
    """(inference, training)."""
    pull = torch.ones_like(x)

    def infer() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (run(x),)

    def train() -> tuple[Tensor, ...]:
        owner.zero_grad(set_to_none=True)
        leaf = x.detach().requires_grad_()
        run(leaf).backward(pull)
        return (leaf.grad,)  # type: ignore[return-value]

    return infer, train


def in_a_row(chosen: dict[str, Work], repeats: int) -> dict[str, float]:
    """Median seconds of a call, of turns of CALLS calls: a call of half a millisecond after others is mostly cold caches."""

    def several(work: Work) -> Work:
        def run() -> tuple[Tensor, ...]:
            for _ in range(CALLS):
                found = work()
            return found

        return run

    taken = interleaved({name: several(work) for name, work in chosen.items()}, repeats)
    return {name: seconds / CALLS for name, seconds in taken.items()}


def speed(regions: int, hidden: int, samples: int, features: int, repeats: int) -> None:
    """Beside all experts at once and both loops, inference and training."""
    torch.manual_seed(0)
    x = clustered(samples, features, regions)
    layer = RegionExperts(KMeans(regions, update="none"), mlp(features, hidden, features), features=features)
    layer.adapt(x)
    experts = modules_of(layer)
    sides: dict[str, Callable[[Tensor], Tensor]] = {
        "ours": layer,
        "all": lambda x: all_of(layer, x),
        "loop": lambda x: loop_of(layer, experts, x),
        "sorted loop": lambda x: sorted_loop_of(layer, experts, x),
    }
    if regions > 32:
        del sides["all"]
    print(f"{regions} regions, {samples} samples of {features} features, hidden {hidden}")
    for k, kind in enumerate(("inference", "training")):
        chosen = {n: works(run, experts if "loop" in n else layer, x)[k] for n, run in sides.items()}
        found = {name: work() for name, work in chosen.items()}
        apart = max(difference(y, found["ours"]) for y in found.values())
        once = interleaved(chosen, repeats)
        taken = in_a_row(chosen, repeats) if regions > 32 else dict(once)
        ours = taken.pop("ours")
        cells = [f"  {kind}: ours {ours * 1e3:.2f} ms"]
        for name, seconds in taken.items():
            target = {("all", 16): 6.0, ("loop", 256): 20.0}.get((name, regions))
            mark = "" if target is None else f" (>= {target:.0f})" + ("" if seconds / ours >= target else " MISSED")
            cells.append(f"{name} {seconds * 1e3:.2f} ms, {seconds / ours:.1f} times{mark}")
        if regions > 32:
            cells.append(
                f"one call after the other side's: ours {once['ours'] * 1e3:.2f} ms, {once['loop'] / once['ours']:.1f} times"
            )
        print("; ".join(cells) + f"; max diff {apart:.1e}", flush=True)


# -------------------------------------------------------------------------------------- accuracy


@dataclass(frozen=True)
class Task:
    """Data to train on and to test on, and how a prediction is judged."""

    name: str
    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor
    outputs: int
    loss: Callable[[Tensor, Tensor], Tensor]
    judge: Callable[[Tensor, Tensor], float]
    unit: str
    higher: bool = False


def digits() -> Task:
    """Handwritten digits, 8 x 8."""
    from sklearn.datasets import load_digits

    found = load_digits()
    x, y = torch.tensor(found.data, dtype=torch.float32) / 16, torch.tensor(found.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]

    def right(p: Tensor, t: Tensor) -> float:
        return 100 * (p.argmax(1) == t).float().mean().item()

    return Task("digits", x[:1300], y[:1300], x[1300:], y[1300:], 10, F.cross_entropy, right, "% right", True)


def piecewise(features: int, cells: int, gathered: bool, samples: int = 4096) -> Task:
    """In each cell of [-1, 1]^d (nearest of random sites) the sine of a linear map of its own, plus a level of its own.

    `gathered`: inputs lie around the sites, so that K-means can see the cells; otherwise they are uniform.
    """
    g = torch.Generator().manual_seed(features)
    sites = 2 * torch.rand(cells, features, generator=g) - 1
    slopes, levels = 3 * torch.randn(cells, features, generator=g), torch.randn(cells, generator=g)
    x = 2 * torch.rand(2 * samples, features, generator=g) - 1
    if gathered:
        centre = sites[torch.randint(cells, (2 * samples,), generator=g)]
        x = centre + 0.15 * torch.randn(2 * samples, features, generator=g)
    cell = torch.cdist(x, sites).argmin(1)
    y = ((slopes[cell] * x).sum(1).sin() + levels[cell])[:, None]

    def error(p: Tensor, t: Tensor) -> float:
        return ((p - t).norm() / (t - t.mean()).norm()).item()

    name = f"piecewise, {cells} cells, {features}-D, {'gathered' if gathered else 'uniform'}"
    return Task(name, x[:samples], y[:samples], x[samples:], y[samples:], 1, F.mse_loss, error, "relative error")


def trained(net: nn.Module, task: Task, steps: int, rate: float) -> tuple[float, float]:
    """(what the judge says of the test data, seconds): Adam, batches of 256, the rate falling to zero."""
    adam, start = torch.optim.Adam(net.parameters(), rate), time.perf_counter()
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    for _ in range(steps):
        picked = torch.randint(len(task.x), (256,))
        adam.zero_grad()
        task.loss(net(task.x[picked]), task.y[picked]).backward()
        adam.step()
        falling.step()
    seconds = time.perf_counter() - start
    net.eval()
    with torch.no_grad():
        return task.judge(net(task.test_x), task.test_y), seconds


def made(task: Task, regions: int, width: int, seed: int) -> nn.Module:
    """Experts, or with one region a dense network."""
    torch.manual_seed(seed)
    net = mlp(task.x.shape[1], width, task.outputs)
    if regions == 1:
        return net
    experts = RegionExperts(KMeans(regions, seed=seed), net)
    experts.adapt(task.x)
    return experts


def best_rate(task: Task, regions: int, width: int, steps: int) -> float:
    """The learning rate that does best on a quarter of the training data, kept out."""
    kept = 3 * len(task.x) // 4
    part = replace(task, x=task.x[:kept], y=task.y[:kept], test_x=task.x[kept:], test_y=task.y[kept:])
    found = {r: trained(made(part, regions, width, 0), part, steps, r)[0] for r in RATES}
    return max(found, key=lambda r: found[r]) if task.higher else min(found, key=lambda r: found[r])


def accuracy(task: Task, regions: int, hidden: int, steps: int, seeds: int) -> None:
    """Experts, a dense network of equal multiply-adds (routing counted), one of equal parameters."""
    features, outputs = task.x.shape[1], task.outputs
    each = features + outputs
    macs = hidden * each + regions * features
    sides = {
        f"{regions} experts": (regions, hidden),
        "dense, equal multiply-adds": (1, macs // each),
        "dense, equal parameters": (1, regions * (hidden * (each + 1) + outputs) // (each + 1)),
    }
    print(task.name)
    for name, (count, width) in sides.items():
        rate = best_rate(task, count, width, steps)
        nets = [made(task, count, width, seed) for seed in range(seeds)]
        runs = [trained(net, task, steps, rate) for net in nets]
        found = [judged for judged, _ in runs]
        parameters = sum(p.numel() for p in nets[0].parameters())
        spent = macs if count > 1 else width * each
        print(
            f"  {name:28} {statistics.median(found):8.3f} {task.unit} ({min(found):.3f} to {max(found):.3f}), "
            f"{parameters} parameters, {spent} multiply-adds, rate {rate:g}, "
            f"{statistics.median(seconds for _, seconds in runs):.1f} s",
            flush=True,
        )


def main() -> None:
    """Time, then accuracy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=600, help="of each training")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--part", choices=["all", "time", "accuracy"], default="all")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.part != "accuracy":
        speed(16, 256, 4096, 64, given.repeats)
        for samples, features in ((512, 16), (1024, 32), (4096, 32), (4096, 64)):
            speed(256, features, samples, features, given.repeats)
    if given.part != "time":
        accuracy(digits(), 16, 32, given.steps, given.seeds)
        for features in (2, 8):
            for gathered in (True, False):
                accuracy(piecewise(features, 16, gathered), 16, 32, given.steps, given.seeds)


if __name__ == "__main__":
    main()
