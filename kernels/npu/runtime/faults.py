"""What a failing NPU means, and what to try."""

from __future__ import annotations

import re

from uq.errors import DeviceError

DOCTOR = "see: uq doctor"

# Numbers of Linux errors in XRT's messages, such as "IOCTL failed (err=-22): Invalid argument".
CONTEXT = {
    2: "the NPU's firmware does not know this xclbin; older drivers take signed ones only",
    11: "locked memory is limited; raise it (ulimit -l)",
    12: "memory for the NPU ran out; close programs that use it",
    13: "you may not open the NPU",
    16: "all columns of the NPU are taken; close programs that use it",
    19: "the NPU is gone, or may not see this process's memory (IOMMU)",
    22: "the driver does not take this xclbin: it is for another NPU, or one of the two is older",
    28: "all columns of the NPU are taken; close programs that use it",
    95: "the driver is older than XRT, or the IOMMU is in a mode that it does not know",
}
STATES = {
    "TIMEOUT": "the NPU did not answer in time. The design may wait for data that nobody sends: "
    "uq npu verify finds such, and --device npu-emulator shows who waits for what",
    "ERROR": "the NPU reported an error while it ran the design",
    "ABORT": "the run was aborted: the NPU's firmware often does not fit its driver",
    "NORESPONSE": "the NPU's firmware does not answer: unload and load the module amdxdna, or "
    "switch the machine off and on",
    "SKERROR": "the firmware refused the run",
    "SKCRASHED": "the firmware crashed: switch the machine off and on",
}
NOT_DONE = ("NEW", "QUEUED", "SUBMITTED")


class NpuTimeout(DeviceError):
    """The NPU did not answer in time; its context is given up."""


def refused(what: str, error: Exception) -> DeviceError:
    """The error of a call to XRT in words."""
    said = " ".join(str(error).split())
    number = re.search(r"err=-?(\d+)", said)
    meaning = CONTEXT.get(int(number[1])) if number else None
    why = f": {meaning}" if meaning else ""
    return DeviceError(f"{what}{why}; XRT says: {said}; {DOCTOR}")


def ended(state: str, waited: int) -> DeviceError:
    """What a run means that did not end well.

    Args:
        state: the name of an ert_cmd_state without its prefix.
        waited: milliseconds.
    """
    if state == "TIMEOUT" or state in NOT_DONE:
        return NpuTimeout(f"after {waited / 1000:g} s {STATES['TIMEOUT']}; {DOCTOR}")
    meaning = STATES.get(state, f"the run ended in the state {state}")
    return DeviceError(f"{meaning}; {DOCTOR}, and the kernel's log: sudo dmesg | grep amdxdna")
