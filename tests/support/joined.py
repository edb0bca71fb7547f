"""A rank that a launcher starts: trains plans and writes how far it is from one device.

python -m support.joined CASES.json FOLDER
"""

import json
import sys
from pathlib import Path

from runtime.launch import initialize, leave
from support.equality import on_process


def main() -> None:
    process = initialize()
    cases = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    found = on_process({"cases": cases}, process)
    text = json.dumps({"world_size": process.world_size, "local_rank": process.local_rank, "found": found})
    Path(sys.argv[2], f"{process.rank}.json").write_text(text, encoding="utf-8")
    leave()


if __name__ == "__main__":
    main()
