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
│   └── WeightsChecksumError  (also a WeightsError)
├── BudgetExceeded        the arena has no room; the caller leaves the block unprotected
└── WeightsError          the files of a model cannot be loaded                (exit 3)
    ├── BadWeightsFileError    a file is not what the format allows: header, overlap, hole, duplicate, path
    │   ├── TruncatedWeightsError  a file ends before what its header promises
    │   └── MissingShardError      a file that the index names is not there
    ├── UnsafeWeightsError     a pickle, which could run code; it is never opened
    ├── WeightsReadError       the disk did not give the bytes, or not in time
    ├── WeightsChangedError    a file was written to while it was read, or since
    ├── WeightsChecksumError   bytes differ from those of the first load
    ├── RemoteError            where the model lies does not give it, or not in time
    ├── DiskFullError          the disk has no room for the model
    └── PoolError              the holder of the host-memory pool; the load goes to the disk instead
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


class WeightsError(GhostserveError):
    """The files of a model cannot be loaded; the message names the file and what to do."""

    exit_code = 3


class BadWeightsFileError(WeightsError):
    """A file is not what the safetensors format allows, or the files of a model contradict each other."""


class TruncatedWeightsError(BadWeightsFileError):
    """A file ends before what its header promises: an interrupted download or copy."""


class MissingShardError(BadWeightsFileError):
    """A file that the model's index names is not there."""


class UnsafeWeightsError(WeightsError):
    """Only pickled weights are there. Reading them could run code, so they are never opened."""


class WeightsReadError(WeightsError):
    """The disk or file system did not give the bytes, or not in time; the message says where."""


class WeightsChangedError(WeightsError):
    """A file was changed while it was read, or is not the one that was looked at before."""


class WeightsChecksumError(WeightsError, CorruptionError):
    """The bytes of a file differ from what they were when it was first loaded."""


class PoolError(WeightsError):
    """The holder of the host-memory pool failed or answered wrongly; loads go on from the disk."""


class RemoteError(WeightsError):
    """The place where a model lies does not give it: unreachable, not there, not allowed, or too slow."""


class DiskFullError(WeightsError):
    """The disk has no room for the model; the message names the folder and how much is needed."""
