"""The room `core` by itself: no daemon, no gRPC; real files, real memory files, real processes.

A package, so that modules of other rooms may have the same names.
"""
