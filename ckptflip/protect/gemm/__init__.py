"""Matrix products that check themselves: quantised ones exactly, float ones within what rounding explains.

`linear` has the layers, `checked` the product that they run, `packing` and `passes` how it is checked,
`recovery` what is done about a fault, `faulting` faults for measuring; `floats` checks float products.
"""
