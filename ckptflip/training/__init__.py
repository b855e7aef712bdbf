"""Training that stops at any epoch and resumes exactly: workloads, runs and what they recorded.

- `Workload`: what a recipe must offer to be resumed from a checkpoint, altered or not; `find` looks one up.
- `pytorch.TorchWorkload`: makes a workload of a PyTorch model, an optimizer and data.
- `harness.train`, `harness.resume`: run one, epoch by epoch.
- `track.Track`: what a run recorded.
"""

from ckptflip.training.harness import resume, train
from ckptflip.training.track import Row, Track
from ckptflip.training.workload import Workload, find

__all__ = ["Row", "Track", "Workload", "find", "resume", "train"]
