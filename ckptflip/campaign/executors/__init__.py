"""Executors: where the tasks of a campaign run. One module each behind one protocol."""

from ckptflip.campaign.executors.protocol import Executor, Job, Limits, Loss, Report
from ckptflip.campaign.executors.registry import names, start

__all__ = ["Executor", "Job", "Limits", "Loss", "Report", "names", "start"]
