"""Which workers may take part: those that would make the same bytes as this machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from uq.cluster.worker import Facts

Hashes = Callable[[], Mapping[str, str]]  # weight file -> of its content, which takes its time


def difference(
    here: Facts, there: Facts, same_cpu: bool, hashes_here: Hashes, hashes_there: Hashes
) -> str | None:
    """Why a worker cannot take part, in words that tell what to do; None if it can.

    Files of the same size that were changed at another time are compared by their content.

    Args:
        same_cpu: floating-point products of BLAS are sent, which differ between processors.
    """
    for package, version in here.software.items():
        found = there.software.get(package, "nothing")
        if found != version:
            return f"has {package} {found}, here is {version}; install the same there"
    if same_cpu and here.cpu != there.cpu:
        return f"has a {there.cpu} processor, here is a {here.cpu}; --method rtn can use both"
    for name in here.files.keys() | there.files.keys():
        size, found_size = (f.files.get(name, (None,))[0] for f in (here, there))
        if size != found_size:
            return f"has {name} of {_bytes(found_size)}, here of {_bytes(size)}; copy it there"
    if here.files != there.files:
        ours, theirs = hashes_here(), hashes_there()
        for name, sha256 in ours.items():
            if theirs[name] != sha256:
                return f"has {name} with content {theirs[name][:12]}, here {sha256[:12]}; copy it"
    return None


def _bytes(size: int | None) -> str:
    return "no such file" if size is None else f"{size:,} bytes"
