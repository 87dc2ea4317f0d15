"""Block sizes of the Triton kernels: one table, each row with its reason, and the search for better ones.

Rows are chosen by kernel, side width and architecture family, never by batch or length, so that the same
inputs give the same bits on every call and nothing compiles twice for a new number of frames.

``python -m meft_kernels.tune`` measures better rows for one device on request and writes them to a JSON file;
where there is such a file for the device at hand, its rows come first. The kernels import ``row`` and
``choice``; nothing that they import knows of the check, the search or the command.
"""
