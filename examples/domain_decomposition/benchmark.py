"""CNN-DNNs of several decompositions against the global CNN, in accuracy and seconds of training; resumable.

    python -m examples.domain_decomposition.benchmark --seeds 0 1 2 -o examples/domain_decomposition/rows.csv
    python -m examples.domain_decomposition.benchmark --data brain --grids 2x2x2 1x1x2 --overlaps 0 2 -o brain.csv

One process trains everything, one network after the other, so that no network's seconds are disturbed by another's: a
decomposition's seconds with a rank for each part are those of its slowest local network, then of the coarse one. --show
prints the medians of a file. The global CNN is trained once for each seed.
"""

import argparse
import functools
import statistics
from pathlib import Path

from examples.benchmarks.rows import read_rows, write_rows
from examples.domain_decomposition.data import load
from examples.domain_decomposition.networks import small_cnn
from examples.domain_decomposition.ways import Row, decomposed_rows, end_to_end_rows, global_row
from planner.ir.subdomains import parse_grid
from runtime.decomposition import Decomposition, Recipe, Settings, fit


def parser():
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--data", default="digits", help="digits, brain, or a folder")
    found.add_argument("--size", type=int, default=32, help="height and width that images get")
    found.add_argument("--grids", nargs="+", default=["2x2", "1x2"])
    found.add_argument("--overlaps", nargs="+", type=int, default=[0, 4])
    found.add_argument("--seeds", nargs="+", type=int, default=[0])
    found.add_argument("--epochs", type=int, default=15)
    found.add_argument("--coarse-epochs", type=int, default=30)
    found.add_argument("--folder", type=Path, help="save networks here after every epoch, go on from what is there")
    found.add_argument("--show", action="store_true", help="only print the table of the file")
    found.add_argument("-o", "--output", type=Path, required=True)
    return found


def main():
    arguments = parser().parse_args()
    if not arguments.show:
        measure(arguments)
    print("\n".join(lines(read_rows(arguments.output, Row))))


def measure(arguments):
    data = load(arguments.data, arguments.size)
    factory = functools.partial(small_cnn, classes=data.classes)
    rows = read_rows(arguments.output, Row)
    done = {(row.data, row.grid, row.overlap, row.epochs, row.seed) for row in rows}

    def keep(found):
        rows.extend(found)
        write_rows(arguments.output, rows, Row)

    for seed in arguments.seeds:
        settings = Settings(arguments.epochs, seed=seed)
        recipe = Recipe(settings, Settings(arguments.coarse_epochs, seed=seed))
        if (data.name, "", 0, settings.epochs, seed) not in done:
            keep([global_row(factory, data, settings, folder_of(arguments.folder, data.name, "whole", seed))])
        for grid in arguments.grids:
            for overlap in arguments.overlaps:
                if (data.name, grid, overlap, settings.epochs, seed) in done:
                    continue
                folder = folder_of(arguments.folder, data.name, grid, overlap, seed)
                decomposition = Decomposition(data.input_shape, parse_grid(grid), overlap)
                fitted = fit(factory, decomposition, data.train, recipe, folder=folder)
                found = decomposed_rows(data, decomposition, fitted, settings)
                keep(found + end_to_end_rows(factory, data, decomposition, fitted, settings, folder))


def folder_of(folder, *names):
    """Return the folder of a case, which is made; None without one."""
    if folder is None:
        return None
    found = folder / "-".join(map(str, names))
    found.mkdir(parents=True, exist_ok=True)
    return found


def lines(rows):
    """Yield the README's table: medians over the seeds, seconds as shares of the global CNN's of the same seed."""
    whole = {(row.data, row.epochs, row.seed): row.seconds for row in rows if not row.grid}
    yield "| data | parts | overlap | way | accuracy | a rank for each part | one rank | parameters |"
    yield "|---|---|---|---|---|---|---|---|"
    for data, grid, overlap, way in dict.fromkeys((row.data, row.grid, row.overlap, row.way) for row in rows):
        group = [r for r in rows if (r.data, r.grid, r.overlap, r.way) == (data, grid, overlap, way)]
        shares = [accuracy(row) for row in group]
        spread = f" ({min(shares):.1f} to {max(shares):.1f})" if len(shares) > 1 else ""
        parallel, alone = (
            statistics.median(getattr(row, what) / whole[row.data, row.epochs, row.seed] for row in group)
            for what in ("seconds", "alone_s")
        )
        seconds = f"{statistics.median(row.seconds for row in group):.1f} s, " if not grid else ""
        cut = f"{data} | {grid} | {overlap}" if grid else f"{data} | whole | "
        right = f"{statistics.median(shares):.1f} %{spread}"
        yield f"| {cut} | {way} | {right} | {seconds}{parallel:.2f} | {alone:.2f} | {group[0].parameters:,} |"


def accuracy(row):
    return 100 * row.accuracy


if __name__ == "__main__":
    main()
