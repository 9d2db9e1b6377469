"""flowreel: video in, dense optical flow out, as a stream.

The names below are loaded on first use, so that ``import flowreel`` stays fast and needs neither torch nor a GPU.
"""
