"""A page to draw a digit on, served on this machine alone: what a run's network says of it while it is drawn, and why.

The page is in ``templates/``; it needs no network and nothing but what is here.
"""
