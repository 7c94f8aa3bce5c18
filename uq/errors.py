"""Every error a user can meet. The branches say what the user can do about it.

UqError
├── UsageError        the command or an argument; the message names the allowed values
├── CheckpointError   the source model: file, tensor, what was expected
├── BundleError       the bundle: file, field, what was expected
├── DesignError       an NPU design: file, line, what is wrong there
├── DeviceError       a device, a driver or a disk: what was tried, how to get further
├── ToolMissing       an optional package or tool: the exact command that installs it
├── HubError          token, licence, name, network: with the URL to open
└── ThresholdMissed   validation ran, and a limit given by the user was not met
"""


class UqError(Exception):
    """Root of the tree. The command line prints the message and exits with `exit_code`."""

    exit_code = 1


class UsageError(UqError):
    """The command was used wrongly; nothing was done."""

    exit_code = 2


class CheckpointError(UqError):
    """The source model is broken, incomplete or of a kind that is not supported."""


class BundleError(UqError):
    """The bundle is broken, incomplete or newer than this version understands."""


class DesignError(UqError):
    """A design for the NPU is not valid MLIR, or it does not say what it must say."""


class DeviceError(UqError):
    """A device is missing, full or lost."""


class ToolMissing(UqError):
    """An optional package or external tool is not installed."""


class HubError(UqError):
    """The Hugging Face Hub refused or could not be reached."""


class ThresholdMissed(UqError):
    """The model was validated and a limit given by the user was not met."""
