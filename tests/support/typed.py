"""The commands of the pages that show no output: what runs in place of each, where else it runs, which never do."""

import re
from pathlib import Path

from support.pages import ROOT, name

NEVER = ROOT / "tests" / "README.md"
"""Has the table of the commands that nothing runs, with the reason."""
ELSEWHERE = {
    "pip install . && layerwise demo": (".ci/run", "layerwise demo"),
    "layerwise demo": (".ci/run", "layerwise demo"),
    "pip install -e '.[dev]' && pytest -n auto": (".ci/run", "pytest -q -n auto"),
    "python -m examples.benchmarks.coverage --sample": (".ci/run", "python -m examples.benchmarks.coverage --sample"),
    "sudo python -m examples.benchmarks.faults --full": (".ci/full", "python -m examples.benchmarks.faults --full"),
    "bash examples/calibrate.sh": ("tests/distributed/test_examples.py", "examples/calibrate.sh"),
    "python examples/custom_cluster.py": ("tests/distributed/test_examples.py", "examples/custom_cluster.py"),
    "python examples/plan_in_python.py": ("tests/distributed/test_examples.py", "examples/plan_in_python.py"),
    "layerwise run plan.json --launcher ray": (
        "tests/unit/runtime/test_ray.py",
        '"run", "p.json", "--launcher", "ray"',
    ),
    "layerwise plan lenet5 --cluster 4xsamg55-wlan4 --objective inference-rate --group 2 --element-bytes 8 --time-limit"
    " 10s -o p.json": ("tests/unit/cli/test_placing.py", '"lenet5", "--cluster", "4xsamg55-wlan4"'),
}
"""By command: a file that runs it, and what stands there."""
QUICK = {
    "--cluster local-2": "--devices 2", "--cluster ./cluster.json": "--cluster 2x1-t4-eth10", "--measure": "",
    "grid=2x2": "grid=1x2",
}  # fmt: skip
"""What is replaced where no process is to start, and a second is long."""
STARTS_PROCESSES = ("layerwise run ", "layerwise profile ")
SMALLER = {
    "torchrun --nproc-per-node 2 examples/own_cnn.py plan.json": "{} --steps 2",
    "torchrun --nproc-per-node 2 examples/train.py plan.json": "{} --epochs 1",
    "torchrun --nproc-per-node 2 examples/train.py other.json --checkpoint digits": "{} --epochs 1",
    "bash examples/two_nodes.sh plan.json --epochs 2": "{} --epochs 1",
    "torchrun --nproc-per-node 4 --max-restarts 3 examples/train.py plan.json --checkpoint run": (
        "torchrun --nproc-per-node 2 --max-restarts 3 examples/train.py plan.json --checkpoint digits --epochs 1"
    ),
    "layerwise run plan.json": "{} --steps 2",
    "layerwise explain plan.json --cluster local-2": "layerwise explain plan.json --cluster 2xaccelerator-nvlink",
    "python -m examples.brain_tumor.study variants": "{} --epochs 1 --seeds 1 --size 16",
    "python -m examples.brain_tumor.study variants -o examples/brain_tumor/variants.csv": (
        "{} --epochs 1 --seeds 1 --size 16 -o rows.csv"
    ),
    "python -m examples.brain_tumor.study alphas --seeds 1 -o examples/brain_tumor/alphas.csv": (
        "{} --epochs 1 --size 16 -o rows.csv"
    ),
    "python -m examples.brain_tumor.study ways --alpha 0.05 -o examples/brain_tumor/ways.csv": (
        "{} --epochs 1 --size 16 -o rows.csv"
    ),
    "python -m examples.domain_decomposition --grid 2x2 --overlap 4 --global": (
        "{} --size 12 --epochs 1 --coarse-epochs 1"
    ),
    "python -m examples.domain_decomposition --grid 2x2 --overlap 4": "{} --size 12 --epochs 1 --coarse-epochs 1",
    "torchrun --nproc-per-node 2 -m examples.domain_decomposition --grid 2x2 --overlap 4 --folder trained": (
        "{} --size 12 --epochs 1 --coarse-epochs 1"
    ),
    "python -m examples.domain_decomposition.benchmark --seeds 0 1 -o examples/domain_decomposition/rows.csv": (
        "{} --size 12 --grids 1x2 --overlaps 0 --epochs 1 --coarse-epochs 1 -o rows.csv"
    ),
    "python -m examples.feature_extractors.extract plan.json": "{} --images 20 --rounds 2",
    "python -m examples.benchmarks.overhead --steps": "{} --rounds 1",
    "python -m examples.benchmarks.variable_accuracy": "{} --epochs 1 --seeds 1",
    "sudo python -m examples.benchmarks.two_hosts --model alexnet --batch 32 --rate 1gbit": (
        "{} --model lenet5 --batch 4 --rounds 2"
    ),
    "layerwise export plan.json --format dot -o graph.dot && dot -Tsvg graph.dot -o graph.svg": (
        "layerwise export plan.json --format dot -o graph.dot"
    ),
}
"""By command: what runs in its place, with ``{}`` for the command."""
GIVEN = {
    "planner/docs/other_tools.md": "layerwise plan lenet5 --devices 2 -o plan.json",
    "planner/docs/unequal.md": "layerwise profile links --ranks 2 -o cluster.json",
    "runtime/docs/faults.md": "layerwise plan examples/train.py:build_model --input 1,8,8 --devices 2 -o plan.json",
}
"""By page: what makes the files that its commands read."""


def typed(page: Path) -> list[str]:
    """Return the commands in the ``sh`` blocks of a page, one line each, without comments."""
    text = page.read_text().replace("\\\n", " ")
    lines = (line for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) for line in block.splitlines())
    commands = (" ".join(re.sub(r"(^|\s+)#.*$", "", line).split()) for line in lines)
    return [each for each in commands if each and not re.match(r"export |\w+=", each)]


def never() -> list[str]:
    """Return what the table of the commands that never run begins its rows with."""
    _, _, section = NEVER.read_text().partition("## Commands of the pages that never run\n")
    return re.findall(r"^\| `([^`]+)` \|", section.partition("\n## ")[0], re.MULTILINE)


def runs(page: Path) -> list[str]:
    """Return the commands of a page that run by themselves, in order."""
    kept = tuple(never())
    return [each for each in typed(page) if each not in ELSEWHERE and not each.startswith(kept)]


def quick(command: str) -> str | None:
    """Return what runs in place of a command in a process that is there already; None where there is nothing."""
    command = SMALLER.get(command, "{}").format(command)
    if not command.startswith("layerwise ") or command.startswith(STARTS_PROCESSES):
        return None
    for words, others in QUICK.items():
        command = command.replace(words, others)
    return command


def given(page: Path) -> list[str]:
    """Return what makes the files that the commands of a page read."""
    return [command for of_page, command in GIVEN.items() if of_page == name(page)]
