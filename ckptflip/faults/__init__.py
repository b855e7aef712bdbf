"""Policies, fault models, sampling, plans and records. Knows no files and no frameworks."""

from ckptflip.faults.catalogue import ROLE_GROUPS, ROLES, Tensor, matches, select
from ckptflip.faults.plan import Plan
from ckptflip.faults.policy import Policy

__all__ = ["ROLES", "ROLE_GROUPS", "Plan", "Policy", "Tensor", "matches", "select"]
