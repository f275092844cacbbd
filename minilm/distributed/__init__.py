"""Many processes, one model, in the order chapter 13 explains them.

`communication` has ranks that send and receive, `collectives` what is built from that,
`data_parallel` and `asynchronous` the ways to train, `launch` real processes, `cost` what it takes.
"""

__all__: list[str] = []
