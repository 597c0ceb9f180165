"""The one reader of traced programs.

`reading` opens a program and walks it, `primitives` is the table of what each operation does to
the axes of its operands. Forward order, control flow, masks, pruning and growth read through both.
"""
