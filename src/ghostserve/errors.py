"""Every exception of ours, in one tree; the names say whose fault it is.

GhostserveError
├── UsageError            the caller asked for something that cannot be        (exit 2)
│   └── UnsupportedError  this platform, version or model is not handled yet   (exit 2)
├── CheckFailed           a check that the user asked for did not hold         (exit 1)
├── StartError            the server could not be started                      (exit 3)
├── EngineLost            the engine is gone and could not be brought back     (exit 4)
├── ProtocolError         a peer sent what the protocol does not allow
│   └── StaleEpoch        a message from someone already given up
├── CorruptionError       bytes differ from their checksum
└── BudgetExceeded        the arena has no room; the caller leaves the block unprotected
"""


class GhostserveError(Exception):
    """Base of all exceptions raised by ghostserve."""

    exit_code = 1


class UsageError(GhostserveError):
    """The request itself is wrong; the message names the value and the remedy."""

    exit_code = 2


class UnsupportedError(UsageError):
    """The platform, a version or the model is outside what is handled."""


class CheckFailed(GhostserveError):
    """A check that the user asked for did not hold."""

    exit_code = 1


class StartError(GhostserveError):
    """The server could not be started."""

    exit_code = 3


class EngineLost(GhostserveError):
    """The engine is gone and could not be brought back."""

    exit_code = 4


class ProtocolError(GhostserveError):
    """A peer sent what the protocol does not allow."""


class StaleEpoch(ProtocolError):
    """A message or step of an epoch that has been given up."""


class CorruptionError(GhostserveError):
    """Bytes differ from their recorded checksum."""


class BudgetExceeded(GhostserveError):
    """The arena has no free frame within its budget."""
