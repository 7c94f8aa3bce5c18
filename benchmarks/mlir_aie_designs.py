"""mlir-aie's own designs through `uq npu verify`: read, checked, printed and read again.

    git clone https://github.com/Xilinx/mlir-aie
    git -C mlir-aie checkout b544e78d6
    python -m benchmarks.mlir_aie_designs mlir-aie

A design is accepted when it has no error for npu1 and for npu2 and its printed text parses to the
same IR. The others are listed with the first reason. NPUDEVICE, which their tests replace, is the
device that is checked.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from uq.errors import DesignError
from uq.kernels.npu.source import parse_design, print_design
from uq.kernels.npu.verify import verify

DEVICES = ("npu1", "npu2")
FOLDER = Path("test") / "npu-xrt"


def reason(text: str, device: str) -> str:
    """Why a design is refused for a device; empty when it is accepted."""
    try:
        source = parse_design(text.replace("NPUDEVICE", device), "line")
        reports = verify(source, device=device)
        again = parse_design(print_design(source.module), "printed")
    except DesignError as error:
        return str(error)
    for report in reports:
        for finding in report.findings:
            if finding.severity == "error":
                return f"line:{finding.line}: {finding.rule}: {finding.message}"
    same = source.module.is_structurally_equivalent(again.module)
    return "" if same else "the printed text parses to other IR"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.mlir_aie_designs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkout", type=Path, help="a checkout of mlir-aie")
    folder = parser.parse_args().checkout / FOLDER
    designs = sorted(folder.rglob("aie*.mlir"))
    if not designs:
        parser.error(f"{folder} has no aie*.mlir")
    refused = 0
    for path in designs:
        text = path.read_text(encoding="utf-8")
        reasons = {device: why for device in DEVICES if (why := reason(text, device))}
        refused += bool(reasons)
        for device, why in reasons.items():
            print(f"{path.parent.relative_to(folder) / path.name}: {device}: {why}")
    accepted = len(designs) - refused
    print(f"{accepted} of {len(designs)} designs accepted for {' and '.join(DEVICES)}")


if __name__ == "__main__":
    main()
