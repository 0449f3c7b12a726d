"""The cache itself, without sockets, gRPC or environment variables.

Everything here takes bytes, descriptors and a clock and returns values or raises one of
`dgcache_core.errors`. The daemon and the client both stand on it; it knows neither.
"""
