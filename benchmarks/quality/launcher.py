"""Run a command and write what it took: `launcher.py USAGE.json COMMAND ...`.

It imports little, so that its own memory does not show in the child's peak.
"""

import json
import os
import subprocess
import sys
import time


def main() -> int:
    usage_file, *command = sys.argv[1:]
    began = time.perf_counter()
    try:
        child = subprocess.Popen(command)
    except OSError as error:
        print(f"{command[0]}: {error.strerror}")
        return 127
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - began
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    with open(usage_file, "w") as file:
        json.dump({"seconds": seconds, "peak_bytes": peak}, file)
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    raise SystemExit(main())
