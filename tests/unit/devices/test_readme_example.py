import re
from pathlib import Path

from planner.devices import cluster

README = Path(__file__).parents[3] / "profiles" / "README.md"


def test_the_cluster_file_in_the_readme_loads(tmp_path: Path) -> None:
    (example,) = re.findall(r"```json\n(.*?)```", README.read_text(), re.DOTALL)
    path = tmp_path / "lab.json"
    path.write_text(example)
    graph = cluster(path)
    assert [device.id for device in graph.devices] == ["left", "right"]
    assert [(axis.name, axis.size) for axis in graph.mesh().axes] == [("node", 2)]
