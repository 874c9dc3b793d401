"""What must hold after each step: one invariant a function, each with a name and one sentence.

Nothing here shares code with what it judges.  Memory is read through the read-only `Memory` protocol; what
should be there is computed from the ELF files, the ftrace records and the patches as they were declared.
"""
