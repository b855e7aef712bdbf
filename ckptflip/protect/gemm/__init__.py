"""Matrix products that check themselves: float products by row checksums (`floats`)."""
