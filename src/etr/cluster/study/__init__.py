"""Equal wall time on an emulated cluster: which router learns most in the time of the baseline.

1. Rows are trained off the network, by `etr.study`, at equal steps.
2. `capture` records what their trained routers want of further text along their capacity schedule.
3. `timing` times whole steps of that on an emulated cluster, all rows in turn.
4. Each row is trained anew for as many steps as fit into the reference's time; `page` compares.
"""
