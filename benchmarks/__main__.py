"""`python -m benchmarks`: every row of the table, then the comparisons with other ways.

Each benchmark runs in a process of its own, so that none inherits another's memory or threads.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

NAMES = (
    "basicunet_inference",
    "mobilenetv2_inference",
    "segresnet_inference",
    "basicunet_training",
    "resnet18_training",
    "autoencoderkl_decode",
    "loop_overhead",
    "lstm_training",
    "sliced_rnn",
    "linear_recurrence",
    "clustered_attention",
    "region_experts",
    "graph_training",
    "regional_batches",
    "partition_of_unity",
    "attention_pooling",
    "peers",
)
OWN_TABLES = NAMES[NAMES.index("lstm_training") :]
"""These print tables of other columns; they stand below the first."""


def main() -> int:
    """Run all, print one table with the notes below it; the status says whether one failed."""
    parser = argparse.ArgumentParser(description=__doc__, epilog="Other options go to each benchmark.")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES)
    given, passed_on = parser.parse_known_args()
    notes: list[str] = []
    failed: list[str] = []
    header = False
    for name in given.only:
        command = [sys.executable, "-m", f"benchmarks.{name}", *passed_on]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            failed.append(name)
        rows = [text for text in done.stdout.splitlines() if text.startswith("| ")]
        if name in OWN_TABLES:
            notes.append(done.stdout)
            continue
        notes += [text for text in done.stdout.splitlines() if text and not text.startswith("| ")]
        print("\n".join(rows[2:] if header else rows), flush=True)
        header = header or bool(rows)
    print("\n" + "\n".join(notes))
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
