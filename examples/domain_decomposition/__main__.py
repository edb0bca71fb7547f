"""Train a CNN-DNN by domain decomposition on real images or volumes, and hold it against the global CNN.

    python -m examples.domain_decomposition --grid 2x2 --overlap 2
    torchrun --nproc-per-node 2 -m examples.domain_decomposition --grid 2x2 --overlap 2 --folder trained

Every rank trains its own local networks without a word to the others. With --folder it saves after every epoch and,
started again, goes on from there. --data is digits, brain (volumes; pip install 'layerwise[volumes]'), or a folder of
your own with a folder of images for each class. --coherent also trains the same network end to end, from scratch and
from the local networks' weights; --global also trains the CNN that sees the whole input. Rank 0 trains both alone.
"""

import argparse
import dataclasses
import functools
import os
import sys
from pathlib import Path

import torch

from examples.domain_decomposition.data import load
from examples.domain_decomposition.networks import small_cnn
from examples.domain_decomposition.ways import Row, decomposed_rows, end_to_end_rows, global_row
from planner.errors import LayerwiseError
from planner.ir.subdomains import parse_grid
from runtime.decomposition import Decomposition, Recipe, Settings, fit


def parser():
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--data", default="digits", help="digits, brain, or a folder")
    found.add_argument("--size", type=int, default=32, help="height and width that images get")
    found.add_argument("--grid", default="2x2", help="parts in each dimension of space; 2x2x2 for volumes")
    found.add_argument("--overlap", type=int, default=0, help="pixels over each inner boundary")
    found.add_argument("--epochs", type=int, default=15)
    found.add_argument("--coarse-epochs", type=int, default=30)
    found.add_argument("--batch", type=int, default=64)
    found.add_argument("--seed", type=int, default=0)
    found.add_argument("--folder", type=Path, help="save after every epoch, go on from what is there")
    found.add_argument("--coherent", action="store_true")
    found.add_argument("--global", action="store_true", dest="whole")
    return found


def main():
    arguments = parser().parse_args()
    try:
        rows = train(arguments)
    except LayerwiseError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if int(os.environ.get("RANK", "0")) == 0:
        print("\n".join(lines(rows)))
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    return 0


def train(arguments):
    """Return a row for every way of training; on ranks but the first those that all ranks take part in."""
    data = load(arguments.data, arguments.size)
    factory = functools.partial(small_cnn, classes=data.classes)
    decomposition = Decomposition(data.input_shape, parse_grid(arguments.grid), arguments.overlap)
    local = Settings(arguments.epochs, arguments.batch, seed=arguments.seed)
    recipe = Recipe(local, dataclasses.replace(local, epochs=arguments.coarse_epochs))
    fitted = fit(factory, decomposition, data.train, recipe, folder=arguments.folder)
    rows = decomposed_rows(data, decomposition, fitted, local)
    if int(os.environ.get("RANK", "0")) == 0:
        if arguments.coherent:
            rows += end_to_end_rows(factory, data, decomposition, fitted, local, arguments.folder)
        if arguments.whole:
            rows.append(global_row(factory, data, local, arguments.folder))
    return rows


def lines(rows: list[Row]):
    """Yield a table."""
    yield f"{'':34}{'accuracy':>9}{'training':>11}{'one rank':>11}{'parameters':>12}"
    for row in rows:
        yield f"{row.way:34}{row.accuracy:9.1%}{row.seconds:9.2f} s{row.alone_s:9.2f} s{row.parameters:12,}"
    yield "All but the global CNN change the model. training: with a rank for each part; one rank: all parts on it."


if __name__ == "__main__":
    raise SystemExit(main())
