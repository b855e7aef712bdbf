"""The extension is optional: it is found where it was built, and can be switched off."""

import subprocess
import sys

from ckptflip.protect.native import SWITCH, kernels, why_not


def test_kernels_say_which_instructions_they_use():
    found = kernels()
    assert found is None or found.isa() in {"avx512", "avx2", "generic"}


def test_kernels_can_be_switched_off(monkeypatch):
    asked = "from ckptflip.protect.native import kernels, why_not; print(kernels(), why_not())"
    monkeypatch.setenv(SWITCH, "0")
    said = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True).stdout
    assert said.startswith("None ") and f"{SWITCH}=0" in said


def test_the_reason_says_what_to_do(monkeypatch):
    monkeypatch.delenv(SWITCH, raising=False)
    assert "install a C++ compiler" in why_not()
