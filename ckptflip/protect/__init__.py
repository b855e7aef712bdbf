"""Protection that is measured: what detects soft errors, what survives them, and what it costs.

Every protection lives in a package of its own; nothing is imported here, since most need a framework.
"""
