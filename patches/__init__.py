"""Livepatch: patches, objects, funcs, the func_stack, transitions, atomic replace, and the checks."""
