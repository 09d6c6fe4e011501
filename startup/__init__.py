"""What a process sets up before its slow imports: signal handlers, the BLAS, environment variables.

Only entry points import this room for its effects. The environment is written here and nowhere else.
"""
