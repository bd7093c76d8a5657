"""Sites on one machine: hosts in network namespaces, with emulated links between them that can be changed and cut.

`lab.Lab` is the way in. A userspace switch (`switch`, a process of its own) moves every packet; `line` decides when a
packet arrives and `packets` what it is. Linux, iproute2 and root (or a user namespace) are all it needs.
"""
