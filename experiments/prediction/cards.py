"""What is known of a GPU and its host: a few facts that can be looked up, or measured in a minute."""

from __future__ import annotations

from dataclasses import dataclass

from experiments.records.types import PlannedProfile
from experiments.study.spec import Profile

USUAL_HOST_OP_S = 7e-6
"""Seconds that a host needs to start one operation of PyTorch, where that was not measured."""
NVLINK_4_BYTES_PER_S = 450e9
"""Bytes per second and direction of the 18 links of an H100 or H200 (NVIDIA's data sheets: 900 GB/s in
both directions together)."""
PCIE_4_BYTES_PER_S = 32e9
"""The same of 16 lanes of PCIe 4.0, which GPUs without NVLink are connected by."""
DATA_SHEET = ("rtx4070", "rtx4070-laptop")
"""Profiles that state the figures of a data sheet. Elsewhere they are measured, which the coefficients
expect."""
MEASURED_BANDWIDTH, MEASURED_PEAK = 0.88, 0.77
"""What an H200's copies and large products reach of its data sheet (4.24 of 4.8 TB/s, 757 of 989 TFLOP/s)."""


@dataclass(frozen=True)
class Card:
    """One GPU of a host. Each value is greater than 0.

    bandwidth_bytes_per_s: copy bandwidth of its memory. peak_flops: of large matrix products in the
    dtype of the study. host_op_s: seconds that the host needs to start one operation of PyTorch.
    link_bytes_per_s: to another GPU of the host, per direction.
    """

    name: str
    bandwidth_bytes_per_s: float
    peak_flops: float
    memory_bytes: int
    host_op_s: float = USUAL_HOST_OP_S
    link_bytes_per_s: float = PCIE_4_BYTES_PER_S

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name != "name" and not value > 0:
                raise ValueError(f"card {self.name}: {name} is {value}; it must be greater than 0")


def card_of(profile: PlannedProfile) -> Card:
    """The card of a profile as a plan holds it. Raises ValueError for the profile of a CPU."""
    require_gpu(profile["name"], profile["device"])
    linked = profile["name"].startswith(("h100", "h200", "8gpu"))
    measured = profile.get("speeds") == "measured on this machine"
    stated = profile["name"] in DATA_SHEET and not measured
    host_op_s = profile.get("host_op_s")
    if not measured and host_op_s == Profile.model_fields["host_op_s"].default:
        host_op_s = None  # nobody has said it
    return Card(
        profile["name"],
        profile["bandwidth_bytes_per_s"] * (MEASURED_BANDWIDTH if stated else 1.0),
        profile["peak_flops"] * (MEASURED_PEAK if stated else 1.0),
        profile["memory_bytes"],
        host_op_s or USUAL_HOST_OP_S,
        NVLINK_4_BYTES_PER_S if linked else PCIE_4_BYTES_PER_S,
    )


def require_gpu(profile: str, device: str) -> None:
    """Raises ValueError for the profile of a CPU, whose steps are not modelled."""
    if device != "cuda":
        raise ValueError(
            f"profile {profile} describes a CPU, and only steps of GPUs are predicted; give the profile of a GPU, for "
            "example --profile h100"
        )
