"""What HyPar prints [HyPar19]: read off its figures, ten networks, 16 accelerators, batch 256, fp32."""

from dataclasses import dataclass
from typing import Final

BATCH: Final = 256


@dataclass(frozen=True, slots=True)
class Published:
    """One network.

    Attributes:
        title: its name in the paper.
        model: its name here.
        plan: decisions of Fig. 5, outermost level first; 0 data, 1 model parallel.
        model_gb, data_gb, hypar_gb: communication per step, Fig. 8.
        performance: of model parallelism and of HyPar, normalised to data parallelism, Fig. 6.
        energy: likewise, efficiency, Fig. 7.
    """

    title: str
    model: str
    plan: str
    model_gb: float
    data_gb: float
    hypar_gb: float
    performance: tuple[float, float]
    energy: tuple[float, float]


def _vgg(num_convs: int, last: int) -> str:
    level = "0" * num_convs + "111"
    return " ".join([level] * 3 + ["0" * (num_convs - 1) + str(last) + "111"])


NETWORKS: Final = (
    Published("SFC", "sfc", "1111 1111 0111 1111", 0.723, 16.9, 0.681, (22.19, 23.48), (9.96, 10.27)),
    Published("SCONV", "sconv", "0000 0000 0000 0000", 0.480, 0.0121, 0.0121, (0.0374, 1.00), (0.198, 1.00)),
    Published("Lenet-c", "lenet-c", "0011 0010 0000 0011", 0.112, 0.0517, 0.0161, (0.469, 3.05), (0.486, 1.81)),
    Published(
        "Cifar-c", "cifar-c", "00000 00000 00010 00111", 0.206, 0.0174, 0.0135, (0.100, 1.23), (0.169, 1.03)
    ),
    Published(
        "AlexNet", "alexnet-hypar", "00000111 00000111 00000111 00000100", 13.0, 2.00, 0.289, (0.183, 3.27),
        (0.421, 1.19),
    ),
    Published("VGG-A", "vgg-a", _vgg(8, 1), 50.1, 15.9, 1.47, (0.346, 4.97), (0.549, 1.35)),
    Published("VGG-B", "vgg-b", _vgg(10, 1), 134, 16.0, 1.47, (0.140, 4.06), (0.348, 1.22)),
    Published("VGG-C", "vgg-c", _vgg(13, 0), 157, 16.0, 1.58, (0.121, 3.92), (0.321, 1.21)),
    Published("VGG-D", "vgg-d", _vgg(13, 1), 157, 16.6, 2.13, (0.130, 3.21), (0.365, 1.16)),
    Published("VGG-E", "vgg-e", _vgg(16, 1), 180, 17.2, 2.76, (0.123, 2.73), (0.377, 1.13)),
)  # fmt: skip
GMEAN_GB: Final = (8.88, 1.83, 0.318)
"""Of model parallelism, data parallelism and HyPar, Fig. 8."""
GMEAN_PERFORMANCE: Final = (0.241, 3.39)
GMEAN_ENERGY: Final = (0.474, 1.51)
GMEAN_TORUS: Final = 2.2
"""Read off the bars of Fig. 12."""
TRICK: Final = {
    "conv5-b32": ((1.16, 1.54, 2.20), (1.05, 1.16, 1.40)),
    "fc3-b4096": ((1.23, 1.58, 2.40), (1.07, 1.19, 1.51)),
}
"""Performance and energy efficiency over one weird trick's choice, with 2, 3 and 4 levels, Fig. 13."""
