"""Livepatch itself: patches, objects, funcs, the func_stack, transitions, atomic replace, and their checks."""
