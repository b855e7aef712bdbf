"""The errors a user can meet. Each says what, where, why and what to do next, and knows its exit code."""


class CkptflipError(Exception):
    """Base of all errors raised on purpose; the command line prints it as one message.

    Attributes:
        exit_code: what the command line exits with.
    """

    exit_code = 1


class UsageError(CkptflipError, ValueError):
    """Options or arguments that make no sense, alone or together."""

    exit_code = 2


class SelectionError(UsageError):
    """A selection that matches nothing, or an amount larger than what was selected."""


class GuardError(CkptflipError):
    """No fault can be drawn that the guards (`forbid`) allow."""


class CheckpointError(CkptflipError):
    """A checkpoint that cannot be read or altered: missing, damaged, in use, of an unknown format."""


class InUseError(CheckpointError):
    """Another process holds the checkpoint open."""


class PartlyAlteredError(CheckpointError):
    """Writing failed, and so did putting the old bytes back: the record is the only way to the original."""


class RecordError(CkptflipError):
    """A record that cannot be read, or that does not belong to this checkpoint."""


class SealError(CkptflipError):
    """A seal that is missing, cut, damaged or of another checkpoint: nothing can be verified with it."""


class DamagedCheckpointError(CheckpointError):
    """A sealed checkpoint whose bytes are no longer those that were sealed."""

    exit_code = 3


class MissingExtraError(CkptflipError):
    """A library is missing that an extra of this package brings."""

    def __init__(self, library: str, extra: str, purpose: str) -> None:
        remedy = f"pip install 'ckptflip[{extra}]'"
        super().__init__(f"{purpose} needs {library}, which is not installed: {remedy}")


class WorkloadError(CkptflipError):
    """A workload that cannot be found, loaded or resumed."""


class LiveError(CkptflipError):
    """A running model that is no longer the one prepared, or in which a fault did not take effect."""


class DetectedError(CkptflipError):
    """A check found a fault in what was computed, or in the weights it was computed with."""

    exit_code = 3


class CampaignError(CkptflipError):
    """A campaign's store or executor that cannot be used: damaged, newer, in use, of another campaign."""


class FailedTrialsError(CkptflipError):
    """A campaign ended with trials that crashed, hung or ran out of memory."""

    exit_code = 4
