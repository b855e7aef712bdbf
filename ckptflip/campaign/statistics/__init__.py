"""Statistics of campaigns: trials needed, intervals that hold, when to stop, strata, pairs, survival.

Nothing here imports scipy before it is used. docs/statistics.md says which function is for what.
"""

from __future__ import annotations

from ckptflip.campaign.statistics.betting import bounded_sequence
from ckptflip.campaign.statistics.comparisons import (
    RateDifference,
    compare_rates,
    false_discovery,
    holm,
    newcombe,
)
from ckptflip.campaign.statistics.designs import Comparison, Needed, compare_designs
from ckptflip.campaign.statistics.intervals import Interval, clopper_pearson, upper_bound, wald, wilson
from ckptflip.campaign.statistics.paired import (
    Differences,
    NoiseFloor,
    NonInferiority,
    bca,
    differences,
    noise_floor,
    non_inferiority,
)
from ckptflip.campaign.statistics.sample_size import (
    exact_sample_size,
    no_event_size,
    sample_size,
    stratum_sizes,
)
from ckptflip.campaign.statistics.sequences import beta_binomial_sequence, running_intersection
from ckptflip.campaign.statistics.stopping import Stop, Stopped, first_stop, stopped
from ckptflip.campaign.statistics.strata import WeightedRate, allocation, drawn_strata, neyman, weighted_rate
from ckptflip.campaign.statistics.survival import Survival, logrank, recovery
from ckptflip.campaign.statistics.weighted import weighted_sequence

__all__ = [
    "Comparison",
    "Differences",
    "Interval",
    "Needed",
    "NoiseFloor",
    "NonInferiority",
    "RateDifference",
    "Stop",
    "Stopped",
    "Survival",
    "WeightedRate",
    "allocation",
    "bca",
    "beta_binomial_sequence",
    "bounded_sequence",
    "clopper_pearson",
    "compare_designs",
    "compare_rates",
    "differences",
    "drawn_strata",
    "exact_sample_size",
    "false_discovery",
    "first_stop",
    "holm",
    "logrank",
    "newcombe",
    "neyman",
    "no_event_size",
    "noise_floor",
    "non_inferiority",
    "recovery",
    "running_intersection",
    "sample_size",
    "stopped",
    "stratum_sizes",
    "upper_bound",
    "wald",
    "weighted_rate",
    "weighted_sequence",
    "wilson",
]
