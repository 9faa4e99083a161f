"""Speed on this machine, each figure beside the bare loop of the same network, or beside peers, measured in turn in one run.

A new measurement is a loop in `loops.py` and a row in `one_process.py` or `worlds.py`, or a peer in `peers.py`.
"""
