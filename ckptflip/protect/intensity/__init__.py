"""For each linear layer the cheapest check, chosen by measurement and explained by arithmetic intensity.

Source: J. Kosaian and K. V. Rashmi, Arithmetic-Intensity-Guided Fault Tolerance for Neural Network Inference
on GPUs, SC '21 (arXiv 2104.09455). Needs PyTorch.
"""

from ckptflip.protect.intensity.layer import CheckedLinear
from ckptflip.protect.intensity.model import Protected, protect
from ckptflip.protect.intensity.schemes import SCHEMES

__all__ = ["SCHEMES", "CheckedLinear", "Protected", "protect"]
