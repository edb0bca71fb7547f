"""Wrong input of the commands beside ``plan``: each message says what is wrong and what would be right."""

import pytest

from support.command_line import layerwise


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("pln alexnet --devices 4", "Did you mean 'plan'"),
        ("profile laers alexnet", "Did you mean 'layers'"),
        ("plan lenet5 --devices 2 --solver atuo", "Did you mean 'auto'"),
        ("plan lenet5 --devices 2 --optimizer adm", "'adm' is not one of 'sgd', 'momentum', 'adam'"),
        ("plan lenet5 --devices 2 --stages two", "neither auto nor a number of at least 1"),
        ("plan lenet5 --devices 2 --schedule 1f1b", "add --stages auto, or a number"),
        ("plan lenet5 --devices 2 --pin classifier.0", "such as fc*=out_channel"),
        ("plan lenet5 --devices 2 --profile none.json", "cannot read device profile 'none.json'"),
        ("plan lenet5 --devices 2 --memory-limit -1GiB", "such as 16GiB, 800MB or 4096"),
        ("plan lenet5 --cluster 4xa1000-nvlink", "Did you mean 'a100'"),
        ("plan lenet5 --cluster local-0", "a number of processes from 1 to 64"),
        ("plan nothing.at.all:x --devices 2 --input 3,8,8", "cannot import 'nothing.at.all'"),
        ("compare lenet5", "give exactly one of --devices N and --cluster NAME"),
        ("compare lenet5 --devices 4 --measur", "--measure"),
        ("compare lenet5 --devices 400 --measure", "400 processes, this host has"),
        ("show .", "cannot read plan '.': Is a directory"),
        ("diff none.json none.json", "cannot read plan 'none.json': No such file"),
        ("run none.json", "cannot read plan 'none.json': No such file"),
        ("run none.json --steps 0", "greater than or equal to 1"),
        ("trace none.json", "Missing option '--output' / '-o'"),
        ("inspect lenet5 --format xml", "'xml' is not one of 'table', 'json', 'csv'"),
        ("profile layers lenet5 -o p.json", "say whose pieces: --devices N or --cluster NAME"),
        ("profile links --ranks 1 -o x.json", "greater than or equal to 2"),
        ("profile fit none.json", "cannot read device profile 'none.json'"),
        ("reproduce hypr", "Did you mean 'hypar'"),
        ("models resnt18", "unknown model 'resnt18'. Did you mean 'resnet18'"),
        ("models resnt*", "unknown model 'resnt*'"),
        ("reproduce hypar -o x.txt", "give a name that ends in .csv"),
        ("decompose lenet5 --input 3,32", "a number of parts for each of the 1 dimensions of space"),
        ("schema --partitions", "--partition"),
        ("demo --link fast", "such as 1gbit or 200mbit"),
        ("doctor --ranks 1000", "less than or equal to 64"),
    ],
)
def test_a_message_says_what_would_be_right(typed: str, words: str) -> None:
    ran = layerwise(*typed.split())
    assert ran.code == 2
    assert words in ran.error
    assert "Traceback" not in ran.err
