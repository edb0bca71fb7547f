"""Published figures beside ours: one module for each paper, all with one function ``reproduce``."""

import importlib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final, cast

from planner.errors import UnknownNameError
from planner.reproduce.figures import Figure, Reproduction

__all__ = ["PAPERS", "Figure", "Reproduction", "reproduce"]

PAPERS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "dn2pciot": "de Oliveira & Borin 2019, Future Internet 11(10):209",
        "flexflow": "Jia et al. 2019, MLSys, arXiv:1807.05358",
        "hypar": "Song et al. 2019, HPCA, arXiv:1901.02067",
        "optcnn": "Jia et al. 2018, ICML, arXiv:1802.04924",
        "owt": "Krizhevsky 2014, arXiv:1404.5997",
        "oyama": "Oyama et al. 2021, IEEE TPDS 32(7), arXiv:2007.12856",
        "pase": "Elango 2021, IPDPS",
        "pipedream": "Narayanan et al. 2019, SOSP; with GPipe and Zhang & Abdelrahman",
        "soybean": "Wang et al. 2018, arXiv:1805.04170",
    }
)
"""What can be reproduced: the name of the module, and the paper."""


def reproduce(name: str) -> Reproduction:
    """Compute the figures of a paper; its module is imported only now.

    Raises:
        UnknownNameError: there is no such paper.
    """
    if name not in PAPERS:
        raise UnknownNameError("paper", name, PAPERS)
    module = importlib.import_module(f"planner.reproduce.{name}")
    return cast("Callable[[], Reproduction]", module.reproduce)()
