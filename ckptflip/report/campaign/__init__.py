"""The report of a campaign: one page that needs nothing else, and its figures as files."""

from ckptflip.report.campaign.writing import write

__all__ = ["write"]
